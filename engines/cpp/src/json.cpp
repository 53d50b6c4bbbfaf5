// The one file that compiles nlohmann's library: it is slow to compile.
#include "json.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "fault.hpp"

namespace export_engine::detail {
namespace {

constexpr std::size_t MOST_VALUES = std::size_t{1} << 20;  // 150 MB; manifests hold some thousands
constexpr std::size_t DEEPEST = 64;                        // values are destroyed by recursion

// Builds values from the parser's events.
class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Builder(std::string where) : where_(std::move(where)) {}

  bool null() override { return put({}); }
  bool number_integer(number_integer_t value) override { return put_integer(value); }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return open(Json::Kind::object); }
  bool start_array(std::size_t) override { return open(Json::Kind::list); }
  bool end_array() override { return close(); }

  bool boolean(bool value) override {
    Json json;
    json.kind = Json::Kind::boolean;
    json.boolean = value;
    return put(std::move(json));
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (value > INT64_MAX) return number_float(static_cast<double>(value), "");
    return put_integer(static_cast<std::int64_t>(value));
  }

  bool number_float(number_float_t value, const string_t&) override {
    Json json;
    json.kind = Json::Kind::number;
    json.number = value;
    return put(std::move(json));
  }

  bool string(string_t& value) override {
    Json json;
    json.kind = Json::Kind::text;
    json.text = std::move(value);
    return put(std::move(json));
  }

  bool key(string_t& value) override {
    open_.back().object.emplace_back().key = std::move(value);
    return true;
  }

  bool end_object() override {
    auto& members = open_.back().object;
    std::sort(members.begin(), members.end(), [](const Member& a, const Member& b) { return a.key < b.key; });
    for (std::size_t i = 1; i < members.size(); ++i)
      if (members[i].key == members[i - 1].key)
        damaged(where_ + ": the key '" + members[i].key + "' stands there twice");
    return close();
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    damaged(where_ + ": not valid JSON, at byte " + std::to_string(position));
  }

  Json root;

 private:
  bool open(Json::Kind kind) {
    if (open_.size() == DEEPEST) damaged(where_ + ": nested more than " + std::to_string(DEEPEST) + " deep");
    open_.emplace_back().kind = kind;
    return true;
  }

  bool close() {
    Json done = std::move(open_.back());
    open_.pop_back();
    return put(std::move(done));
  }

  bool put_integer(std::int64_t value) {
    Json json;
    json.kind = Json::Kind::integer;
    json.integer = value;
    return put(std::move(json));
  }

  bool put(Json value) {
    if (++values_ > MOST_VALUES) damaged(where_ + ": more than " + std::to_string(MOST_VALUES) + " values");
    if (open_.empty())
      root = std::move(value);
    else if (open_.back().kind == Json::Kind::list)
      open_.back().list.push_back(std::move(value));
    else
      open_.back().object.back().value = std::move(value);
    return true;
  }

  std::string where_;
  std::vector<Json> open_;
  std::size_t values_ = 0;
};

const Json* find(const std::vector<Member>& members, const std::string& key) {
  const auto at = std::lower_bound(members.begin(), members.end(), key,
                                   [](const Member& member, const std::string& name) { return member.key < name; });
  return at != members.end() && at->key == key ? &at->value : nullptr;
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  Builder builder(where);
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return std::move(builder.root);
}

void Cursor::refuse(const std::string& wanted) const { damaged(path_ + ": not " + wanted); }

const Json& Cursor::of(Json::Kind kind, const char* wanted) const {
  if (json_->kind != kind) refuse(wanted);
  return *json_;
}

bool Cursor::has(const std::string& key) const { return find(json_->object, key); }

Cursor Cursor::operator[](const std::string& key) const {
  const Json* found = find(of(Json::Kind::object, "an object").object, key);
  if (!found) damaged(path_ + ": lacks '" + key + "'");
  return {*found, path_ + "." + key};
}

std::vector<Cursor> Cursor::items() const {
  std::vector<Cursor> items;
  for (const Json& item : of(Json::Kind::list, "a list").list)
    items.emplace_back(item, path_ + "[" + std::to_string(items.size()) + "]");
  return items;
}

std::vector<std::pair<std::string, Cursor>> Cursor::members() const {
  std::vector<std::pair<std::string, Cursor>> found;
  for (const Member& member : of(Json::Kind::object, "an object").object)
    found.emplace_back(member.key, Cursor(member.value, path_ + "." + member.key));
  return found;
}

const std::string& Cursor::text() const { return of(Json::Kind::text, "a string").text; }

bool Cursor::boolean() const { return of(Json::Kind::boolean, "true or false").boolean; }

std::int64_t Cursor::integer(std::int64_t least, std::int64_t most) const {
  if (json_->kind != Json::Kind::integer || json_->integer < least || json_->integer > most)
    refuse("a whole number of " + std::to_string(least) + " … " + std::to_string(most));
  return json_->integer;
}

double Cursor::number() const {
  if (json_->kind == Json::Kind::integer) return static_cast<double>(json_->integer);
  const double value = of(Json::Kind::number, "a number").number;
  if (!std::isfinite(value)) refuse("a finite number");
  return value;
}

}  // namespace export_engine::detail
