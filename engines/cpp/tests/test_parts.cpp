// What reads bytes that may be anything, without a bundle.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "arrays.hpp"
#include "check.hpp"
#include "fault.hpp"
#include "files.hpp"
#include "half.hpp"
#include "json.hpp"
#include "onnx.hpp"
#include "sha256.hpp"

using namespace export_engine;
using namespace export_engine::detail;

namespace {

template <class Work>
Status status_of(Work work) {
  return guarded([&] { static_cast<void>(work()); });
}

Status json_of(const std::string& text) {
  return status_of([&] { return parse_json(text, "text").kind; });
}

void json_is_read_and_what_is_none_is_refused() {
  const Json json = parse_json(R"({"a": [1, 2.5, true, null, "ü"], "b": {"c": -3}})", "text");
  const Cursor cursor(json, "text");
  CHECK(cursor["a"].items()[0].integer(0, 9) == 1);
  CHECK(cursor["a"].items()[1].number() == 2.5);
  CHECK(cursor["a"].items()[2].boolean());
  CHECK(cursor["a"].items()[3].null());
  CHECK(cursor["a"].items()[4].text() == "ü");
  CHECK(cursor["b"]["c"].integer(-9, 9) == -3);
  CHECK_SAYS(status_of([&] { return cursor["b"]["d"].null(); }), "text.b: lacks 'd'");
  CHECK_SAYS(status_of([&] { return cursor["b"]["c"].integer(0, 9); }), "text.b.c: not a whole number of 0 … 9");
  CHECK_SAYS(status_of([&] { return cursor["a"].text(); }), "text.a: not a string");
  CHECK_SAYS(json_of("{\"a\": 1, \"a\": 2}"), "twice");
  for (const char* bad : {"", "{", "[1,]", "{\"a\" 1}", "NaN", "[Infinity]", "1 2", "\"\xff\"", "// x\n1", "1e999"})
    CHECK_SAYS(json_of(bad), "not valid JSON");
  CHECK_SAYS(json_of(std::string(1000, '[')), "deep");
}

std::string safetensors(std::string header, std::size_t bytes) {
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) file[static_cast<std::size_t>(i)] = static_cast<char>(header.size() >> (8 * i) & 255);
  return file + header + std::string(bytes, '\1');
}

Status safetensors_status(const std::string& file) {
  return status_of([&] { return parse_safetensors(file, "file").size(); });
}

void safetensors_are_read_and_sizes_that_do_not_fit_are_refused() {
  const std::string two = R"({"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
                          R"("y":{"dtype":"I64","shape":[0],"data_offsets":[8,8]}})";
  const Arrays arrays = parse_safetensors(safetensors(two, 8), "file");
  CHECK(arrays.size() == 2 && arrays.at("x").shape() == (Shape{2, 1}) && arrays.at("y").count() == 0);
  CHECK_SAYS(safetensors_status(safetensors(two, 9)), "end at byte 8 of 9");
  CHECK_SAYS(safetensors_status(safetensors(two, 7)), "end at byte 8 of 7");
  CHECK_SAYS(safetensors_status(std::string(8, '\xff') + "{}"), "not all of it");
  CHECK_SAYS(safetensors_status("short"), "not all of it");
  const auto one = [](const char* shape, const char* offsets, const char* dtype) {
    return safetensors(
        std::string(R"({"x":{"dtype":")") + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}", 8);
  };
  CHECK_SAYS(safetensors_status(one("[3]", "[0,8]", "F32")), "as many bytes");
  CHECK_SAYS(safetensors_status(one("[2]", "[4,12]", "F32")), "gap");
  CHECK_SAYS(safetensors_status(one("[2]", "[8,0]", "F32")), "whole number");
  CHECK_SAYS(safetensors_status(one("[-2]", "[0,8]", "F32")), "whole number");
  CHECK_SAYS(safetensors_status(one("[2]", "[0,8]", "BOOL")), "F32, F16 or I64");
  CHECK_SAYS(safetensors_status(one("[1099511627776,1099511627776,1099511627776]", "[0,0]", "F32")), "as many bytes");
}

std::string npy(const std::string& header, std::size_t bytes) {
  const std::string text = header + "\n";
  return std::string("\x93NUMPY\1\0", 8) + static_cast<char>(text.size()) + '\0' + text + std::string(bytes, '\0');
}

Status npy_status(const std::string& file) {
  return status_of([&] { return parse_npy(file, "file").count(); });
}

void a_step_table_is_read_and_anything_else_is_refused() {
  const std::string good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
  CHECK(parse_npy(npy(good, 24), "file").shape() == (Shape{2, 3}));
  CHECK_SAYS(npy_status(npy(good, 23)), "do not fit");
  CHECK_SAYS(npy_status(npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }", 48)), "not fp32");
  CHECK_SAYS(npy_status(npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }", 48)), "not fp32");
  CHECK_SAYS(npy_status(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 999999999), }", 4)),
             "do not fit");
  CHECK_SAYS(npy_status("\x93NUMPY"), "no .npy file");
}

void half_numbers_round_to_the_nearest_even_one() {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::pair<float, std::uint16_t> known[] = {
      {0.0f, 0x0000},         {-0.0f, 0x8000},           {1.0f, 0x3c00},           {65504.0f, 0x7bff},
      {65519.0f, 0x7bff},     {65520.0f, 0x7c00},        {-infinity, 0xfc00},      {0x1p-24f, 0x0001},
      {0x1p-25f, 0x0000},     {0x1.8p-24f, 0x0002},      {0x1p-14f, 0x0400},       {0x1.ff8p-15f, 0x03ff},
      {0x1.ffcp-15f, 0x0400}, {1.0f + 0x1p-11f, 0x3c00}, {1.0f + 0x3p-11f, 0x3c02}};
  for (const auto& [value, bits] : known) {
    std::uint16_t found;
    to_half(&value, &found, 1);
    CHECK(found == bits);
  }
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {  // every one goes there and back
    const auto half = static_cast<std::uint16_t>(bits);
    float value;
    std::uint16_t again;
    to_float(&half, &value, 1);
    to_half(&value, &again, 1);
    CHECK(again == half || (std::isnan(value) && (again & 0x7c00) == 0x7c00 && (again & 0x3ff)));
  }
}

void file_names_that_leave_the_folder_are_refused() {
  const auto named = [](const std::string& name) { return guarded([&] { check_name(name, "here"); }); };
  for (const char* good : {"a", "a/b.c", "..a", "a/..b", "a b", "ü"}) CHECK(named(good).ok());
  for (const char* bad : {"", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\\b", "a\nb"})
    CHECK_SAYS(named(bad), "leaves the folder");
  CHECK_SAYS(named(std::string(2000, 'a')), "leaves the folder");
}

// A model whose graph has an initializer with one external_data entry.
void an_onnx_file_names_the_files_that_it_reads() {
  const auto field = [](char number, const std::string& bytes) {
    return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(bytes.size())} + bytes;
  };
  const std::string entry = field(1, "location") + field(2, "../x");
  const std::string tensor = field(13, entry), graph = field(5, tensor);
  CHECK(external_files(field(7, graph), "file") == std::set<std::string>{"../x"});
  const std::string attribute = field(5, tensor), node = field(5, attribute);
  CHECK(external_files(field(7, field(1, node)), "file") == std::set<std::string>{"../x"});
  CHECK(external_files("", "file").empty());
  CHECK_SAYS(status_of([&] { return external_files(field(7, graph).substr(0, 9), "file").size(); }), "no ONNX file");
  CHECK_SAYS(status_of([] { return external_files("\x0b", "file").size(); }), "no ONNX file");
}

void a_digest_is_the_known_one() {
  Sha256 sha;
  sha.add("a", 1);
  sha.add("bc", 2);
  CHECK(sha.hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

}  // namespace

int main() {
  json_is_read_and_what_is_none_is_refused();
  safetensors_are_read_and_sizes_that_do_not_fit_are_refused();
  a_step_table_is_read_and_anything_else_is_refused();
  half_numbers_round_to_the_nearest_even_one();
  file_names_that_leave_the_folder_are_refused();
  an_onnx_file_names_the_files_that_it_reads();
  a_digest_is_the_known_one();
  return failures() != 0;
}
