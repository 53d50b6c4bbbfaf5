#include "onnx.hpp"

#include <array>
#include <cstdint>
#include <utility>

#include "fault.hpp"

namespace export_engine::detail {
namespace {

// The messages of onnx.proto that lie between a model and its tensors' external data.
enum class Kind { model, graph, node, attribute, tensor, sparse, function, training, entry, other };

struct Field {
  Kind in;
  std::uint64_t number;
  Kind holds;
};

constexpr std::array<Field, 19> FIELDS{{{Kind::model, 7, Kind::graph},
                                        {Kind::model, 20, Kind::training},
                                        {Kind::model, 25, Kind::function},
                                        {Kind::training, 1, Kind::graph},
                                        {Kind::training, 2, Kind::graph},
                                        {Kind::function, 7, Kind::node},
                                        {Kind::function, 11, Kind::attribute},
                                        {Kind::graph, 1, Kind::node},
                                        {Kind::graph, 5, Kind::tensor},
                                        {Kind::graph, 15, Kind::sparse},
                                        {Kind::node, 5, Kind::attribute},
                                        {Kind::attribute, 5, Kind::tensor},
                                        {Kind::attribute, 6, Kind::graph},
                                        {Kind::attribute, 10, Kind::tensor},
                                        {Kind::attribute, 11, Kind::graph},
                                        {Kind::attribute, 22, Kind::sparse},
                                        {Kind::attribute, 23, Kind::sparse},
                                        {Kind::sparse, 1, Kind::tensor},
                                        {Kind::sparse, 2, Kind::tensor}}};

Kind held(Kind in, std::uint64_t number) {
  if (in == Kind::tensor) return number == 13 ? Kind::entry : Kind::other;  // external_data
  for (const Field& field : FIELDS)
    if (field.in == in && field.number == number) return field.holds;
  return Kind::other;
}

class Walker {
 public:
  explicit Walker(const std::string& where) : where_(where) {}

  void walk(std::string_view bytes, Kind kind, int depth) {
    constexpr int DEEPEST = 100;  // as protobuf itself
    if (depth > DEEPEST) refuse();
    while (!bytes.empty()) {
      const std::uint64_t tag = number(bytes);
      if ((tag & 7) == 2) {
        const std::string_view part = take(bytes, number(bytes));
        const Kind inner = held(kind, tag >> 3);
        if (inner == Kind::entry)
          read_entry(part);
        else if (inner != Kind::other)
          walk(part, inner, depth + 1);
      } else {
        skip(bytes, tag & 7);
      }
    }
  }

  std::set<std::string> files;

 private:
  [[noreturn]] void refuse() const { damaged(where_ + ": no ONNX file"); }

  std::uint64_t number(std::string_view& bytes) const {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      if (bytes.empty()) refuse();
      const auto byte = static_cast<unsigned char>(bytes.front());
      bytes.remove_prefix(1);
      value |= std::uint64_t{byte & 127u} << shift;
      if (byte < 128) return value;
    }
    refuse();
  }

  std::string_view take(std::string_view& bytes, std::uint64_t count) const {
    if (count > bytes.size()) refuse();
    const std::string_view part = bytes.substr(0, count);
    bytes.remove_prefix(count);
    return part;
  }

  void skip(std::string_view& bytes, std::uint64_t type) const {
    if (type == 0)
      number(bytes);
    else if (type == 1)
      take(bytes, 8);
    else if (type == 5)
      take(bytes, 4);
    else
      refuse();
  }

  // A StringStringEntryProto: a key and a value.
  void read_entry(std::string_view bytes) {
    std::string_view key, value;
    while (!bytes.empty()) {
      const std::uint64_t tag = number(bytes);
      if ((tag & 7) != 2) {
        skip(bytes, tag & 7);
        continue;
      }
      const std::string_view text = take(bytes, number(bytes));
      if (tag >> 3 == 1) key = text;
      if (tag >> 3 == 2) value = text;
    }
    if (key == "location") files.emplace(value);
  }

  const std::string& where_;
};

}  // namespace

std::set<std::string> external_files(std::string_view onnx, const std::string& where) {
  Walker walker(where);
  walker.walk(onnx, Kind::model, 0);
  return std::move(walker.files);
}

}  // namespace export_engine::detail
