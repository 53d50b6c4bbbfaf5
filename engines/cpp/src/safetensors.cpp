#include <algorithm>
#include <cstring>

#include "arrays.hpp"
#include "fault.hpp"
#include "json.hpp"

namespace export_engine::detail {
namespace {

constexpr std::int64_t LARGEST = std::int64_t{1} << 40;

struct Entry {
  std::size_t first, last;
  std::string name;
  DType dtype;
  Shape shape;
};

std::uint64_t little_endian(std::string_view bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < 8; ++i) value |= std::uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
  return value;
}

DType dtype_of(const Cursor& entry) {
  const std::string& name = entry["dtype"].text();
  if (name == "F32") return DType::fp32;
  if (name == "F16") return DType::fp16;
  if (name == "I64") return DType::int64;
  entry["dtype"].refuse("F32, F16 or I64");
}

Entry entry_of(const std::string& name, const Cursor& cursor) {
  constexpr std::size_t MOST_AXES = 8;
  Entry entry{0, 0, name, dtype_of(cursor), {}};
  for (const Cursor& size : cursor["shape"].items()) entry.shape.push_back(size.integer(0, LARGEST));
  const auto offsets = cursor["data_offsets"].items();
  if (offsets.size() != 2 || entry.shape.size() > MOST_AXES) cursor.refuse("a tensor");
  entry.first = static_cast<std::size_t>(offsets[0].integer(0, LARGEST));
  entry.last = static_cast<std::size_t>(offsets[1].integer(static_cast<std::int64_t>(entry.first), LARGEST));
  const std::size_t bytes = static_cast<std::size_t>(count_of(entry.shape)) * size_of(entry.dtype);
  const bool empty = std::find(entry.shape.begin(), entry.shape.end(), 0) != entry.shape.end();
  if (entry.last - entry.first != bytes || (bytes == 0 && !empty)) cursor.refuse("as many bytes as its shape says");
  return entry;
}

// The tensors fill the data without a gap or an overlap, so that no byte is unaccounted for.
void check_order(std::vector<Entry>& entries, std::size_t bytes, const std::string& where) {
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.first != b.first ? a.first < b.first : a.last < b.last; });
  std::size_t at = 0;
  for (const Entry& entry : entries) {
    if (entry.first != at) damaged(where + ": the tensors overlap or leave a gap before '" + entry.name + "'");
    at = entry.last;
  }
  if (at != bytes) damaged(where + ": its tensors end at byte " + std::to_string(at) + " of " + std::to_string(bytes));
}

}  // namespace

Arrays parse_safetensors(std::string_view bytes, const std::string& where) {
  const std::uint64_t header = bytes.size() < 8 ? UINT64_MAX : little_endian(bytes);
  if (bytes.size() < 8 || header > bytes.size() - 8) damaged(where + ": no safetensors file, or not all of it");
  const Json json = parse_json(bytes.substr(8, header), where);
  const std::string_view data = bytes.substr(8 + header);
  std::vector<Entry> entries;
  for (const auto& [name, cursor] : Cursor(json, where).members())
    if (name != "__metadata__") entries.push_back(entry_of(name, cursor));
  check_order(entries, data.size(), where);
  Arrays arrays;
  for (Entry& entry : entries) {
    Array array(entry.dtype, std::move(entry.shape));
    std::memcpy(array.data(), data.data() + entry.first, array.bytes());
    arrays.emplace(std::move(entry.name), std::move(array));
  }
  return arrays;
}

}  // namespace export_engine::detail
