// JSON as values, and a cursor that knows where in a document it stands, for messages.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace export_engine::detail {

struct Member;

// Of the fields, the one that `kind` names holds the value.
struct Json {
  enum class Kind { null, boolean, integer, number, text, list, object };

  Kind kind = Kind::null;
  bool boolean = false;
  std::int64_t integer = 0;
  double number = 0;
  std::string text;
  std::vector<Json> list;
  std::vector<Member> object;  // sorted by key
};

struct Member {
  std::string key;
  Json value;
};

// Parses UTF-8 JSON without NaN, infinity and repeated keys; `where` names the document in messages.
Json parse_json(std::string_view text, const std::string& where);

// A place in a document; each of its readers refuses, by name, what is missing or of another type.
class Cursor {
 public:
  Cursor(const Json& json, std::string path) : json_(&json), path_(std::move(path)) {}

  Cursor operator[](const std::string& key) const;
  bool has(const std::string& key) const;
  bool null() const { return json_->kind == Json::Kind::null; }
  std::vector<Cursor> items() const;
  std::vector<std::pair<std::string, Cursor>> members() const;
  bool is_text() const { return json_->kind == Json::Kind::text; }

  const std::string& text() const;
  std::string text_or(const std::string& otherwise) const { return null() ? otherwise : text(); }
  bool boolean() const;
  std::int64_t integer(std::int64_t least, std::int64_t most) const;
  double number() const;

  [[noreturn]] void refuse(const std::string& wanted) const;
  const std::string& path() const { return path_; }

 private:
  const Json& of(Json::Kind kind, const char* wanted) const;

  const Json* json_;
  std::string path_;
};

}  // namespace export_engine::detail
