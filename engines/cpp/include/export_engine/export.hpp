// Marks what a shared library of this name exports.
#pragma once

#if defined(EXPORT_ENGINE_SHARED) && defined(__GNUC__)
#define EXPORT_ENGINE_API __attribute__((visibility("default")))
#else
#define EXPORT_ENGINE_API
#endif
