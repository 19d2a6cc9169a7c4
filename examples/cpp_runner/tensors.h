// Safetensors files: 8 bytes of the header's length, the header in JSON, the data.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "json.h"

using Tensors = std::map<std::string, at::Tensor>;

inline const std::vector<std::pair<std::string, at::ScalarType>>& dtypes() {
  static const std::vector<std::pair<std::string, at::ScalarType>> known = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong},
      {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},  {"U8", at::kByte},       {"BOOL", at::kBool}};
  return known;
}

inline at::ScalarType dtype_of(const std::string& name) {
  for (const auto& [known, dtype] : dtypes())
    if (known == name) return dtype;
  throw std::runtime_error("unknown dtype " + name + " in a safetensors file");
}

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// The tensors by name, as views of the mapped file; pages are read when they are first used.
inline Tensors read_tensors(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + " is no file");
  int64_t size = static_cast<int64_t>(std::filesystem::file_size(path)), length = 0;
  if (size < 8) throw std::runtime_error(path + " is no safetensors file: it has " + std::to_string(size) + " bytes");
  at::Tensor raw = at::from_file(path, /*shared=*/false, size, at::TensorOptions().dtype(at::kByte));
  const auto* bytes = raw.const_data_ptr<uint8_t>();
  for (int i = 7; i >= 0; --i) length = length << 8 | bytes[i];
  if (length <= 0 || length > size - 8)
    throw std::runtime_error(path + " is no safetensors file: its header has " + std::to_string(length) + " of " +
                             std::to_string(size) + " bytes");
  const int64_t start = 8 + length;
  Tensors tensors;
  const Json header = Json::parse(std::string(reinterpret_cast<const char*>(bytes) + 8, static_cast<size_t>(length)));
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") continue;
    const auto ends = entry["data_offsets"].integers();
    if (ends.size() != 2 || ends[0] < 0 || ends[1] < ends[0] || ends[1] > size - start)
      throw std::runtime_error(path + " ends before the data of " + name);
    const at::ScalarType dtype = dtype_of(entry["dtype"].string());
    at::Tensor data = raw.slice(0, start + ends[0], start + ends[1]);
    // A file may put a tensor where its elements cannot be read in place.
    if (data.storage_offset() % static_cast<int64_t>(at::elementSize(dtype)) != 0) data = data.clone();
    tensors[name] = data.view(dtype).view(entry["shape"].integers());
  }
  return tensors;
}

inline void write_tensor(const std::string& path, const std::string& name, const at::Tensor& tensor) {
  const at::Tensor data = tensor.cpu().contiguous();
  std::string dtype, shape;
  for (const auto& [known, value] : dtypes())
    if (value == data.scalar_type()) dtype = known;
  for (int64_t length : data.sizes()) shape += (shape.empty() ? "" : ",") + std::to_string(length);
  std::ostringstream entry;
  entry << "{\"" << name << "\":{\"dtype\":\"" << dtype << "\",\"shape\":[" << shape << "],\"data_offsets\":[0,"
        << data.nbytes() << "]}}";
  std::string header = entry.str();
  header.append((8 - header.size() % 8) % 8, ' ');
  std::ofstream file(path, std::ios::binary);
  for (int i = 0; i < 8; ++i) file.put(static_cast<char>(header.size() >> (8 * i) & 0xff));
  file << header;
  file.write(static_cast<const char*>(data.const_data_ptr()), static_cast<std::streamsize>(data.nbytes()));
  file.close();
  if (!file) throw std::runtime_error(path + " cannot be written");
}

// Images [B, 3, H, W] in -1..1 side by side, as a binary PPM.
inline void write_ppm(const std::string& path, const at::Tensor& images) {
  if (images.dim() != 4 || images.size(1) != 3)
    throw std::runtime_error("a picture needs latents [B, 3, H, W]; these models' latents need a decoder first");
  const at::Tensor unit = (images.to(at::kCPU, at::kFloat) / 2 + 0.5).clamp(0, 1);
  const at::Tensor rows = unit.permute({2, 0, 3, 1}).reshape({images.size(2), -1, 3});
  const at::Tensor pixels = (rows * 255).round().to(at::kByte).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << pixels.size(1) << " " << pixels.size(0) << "\n255\n";
  file.write(static_cast<const char*>(pixels.const_data_ptr()), static_cast<std::streamsize>(pixels.nbytes()));
  file.close();
  if (!file) throw std::runtime_error(path + " cannot be written");
}
