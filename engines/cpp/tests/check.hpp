// The least that tests need: checks that say where they failed, and a list of what is run.
#pragma once

#include <cstdio>
#include <string>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      ++failures();                                                       \
    }                                                                     \
  } while (false)

// A status must be a failure that says this.
#define CHECK_SAYS(status, part)                                                                    \
  do {                                                                                              \
    const std::string text_of_it = (status).text();                                                 \
    if ((status).ok() || text_of_it.find(part) == std::string::npos) {                              \
      std::printf("%s:%d: '%s' does not say '%s'\n", __FILE__, __LINE__, text_of_it.c_str(), part); \
      ++failures();                                                                                 \
    }                                                                                               \
  } while (false)
