#include "package.h"

#include <caffe2/serialize/inline_container.h>

#include <filesystem>
#include <unordered_map>

#include "json.h"

#ifdef RUNNER_CUDA
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#endif

namespace {

constexpr int64_t kFormat = 1;
const std::string kMetadata = "extra/inductor_moe.json";
const std::string kWeights = "data/generation/weights/";

uint32_t crc32(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  uint32_t found = ~0u;
  for (size_t i = 0; i < size; ++i) {
    found ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) found = (found >> 1) ^ (0xedb88320u & (0u - (found & 1)));
  }
  return ~found;
}

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf},
      {"float64", at::kDouble}, {"int64", at::kLong},       {"int32", at::kInt},
      {"int16", at::kShort},    {"int8", at::kChar},        {"uint8", at::kByte},
      {"bool", at::kBool},
  };
  const auto found = known.find(name);
  if (found == known.end()) throw Failure("the package uses dtype " + name + ", unknown here");
  return found->second;
}

}  // namespace

std::string first_line(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torch_error ? torch_error->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

Package::Package(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw Failure(path + ": no such file");
  std::unique_ptr<caffe2::serialize::PyTorchStreamReader> reader;
  Json metadata;
  try {
    reader = std::make_unique<caffe2::serialize::PyTorchStreamReader>(path);
  } catch (const std::exception&) {
    throw Failure(path + " is not a .pt2 package, or was cut off while it was written or copied");
  }
  if (!reader->hasRecord(kMetadata))
    throw Failure(path + " holds no generation methods; inductor_moe.export_generation writes them");
  try {
    auto [data, size] = reader->getRecord(kMetadata);
    metadata = Json::parse(std::string(static_cast<const char*>(data.get()), size));
    const int64_t format = metadata["format"].integer();
    if (format != kFormat)
      throw Failure(path + ": the package has format " + std::to_string(format) +
                    "; this runner reads format " + std::to_string(kFormat) +
                    ": export the model again, or build the runner that belongs to it");
    batch_size = metadata["batch_size"].integer();
    max_seq_len = metadata["max_seq_len"].integer();
    if (metadata.members().count("ranks") && metadata["ranks"].integer() > 1)
      throw Failure(path + ": the package is for one of " +
                    std::to_string(metadata["ranks"].integer()) +
                    " ranks; this runner starts no process group, so load it with "
                    "inductor_moe.load_generation");
    vocab_size = metadata["vocab_size"].integer();
    eos_token_ids = metadata["eos_token_ids"].integers();
    if (metadata.members().count("sampling")) sampling = metadata["sampling"].text();
    for (const Json& state : metadata["states"].items())
      states.push_back({dtype_of(state["dtype"].text()), state["shape"].integers()});
  } catch (const Failure&) {
    throw;
  } catch (const std::exception& error) {
    throw Failure(path + ": " + kMetadata + " is damaged (" + first_line(error) + ")");
  }
  check_device(path, metadata["device"].text(), metadata["compute_capability"].text());

  // PyTorch's loader would run damaged code.
  if (metadata.has("checksums"))
    for (const auto& [name, checksum] : metadata["checksums"].members()) {
      if (!reader->hasRecord(name)) throw Failure(path + ": record " + name + " is missing");
      auto [data, size] = reader->getRecord(name);
      if (crc32(data.get(), size) != static_cast<uint32_t>(checksum.integer()))
        throw Failure(path + ": record " + name + " is damaged");
    }

  const auto file_size = static_cast<int64_t>(std::filesystem::file_size(path));
  const at::Tensor mapped = at::from_file(path, false, file_size, at::kByte);
  for (const Json& bytes : metadata["weight_bytes"].items()) {
    const int64_t length = bytes.integer();
    const auto name = kWeights + std::to_string(weights_.size());
    if (!reader->hasRecord(name)) throw Failure(path + ": record " + name + " is missing");
    const auto offset = static_cast<int64_t>(reader->getRecordOffset(name));
    if (offset + length > file_size) throw Failure(path + ": record " + name + " is cut off");
    weights_.push_back(mapped.narrow(0, offset, length).to(device));
  }
  for (const auto& [name, constants] : metadata["methods"].members()) {
    std::unordered_map<std::string, at::Tensor> tensors;
    for (const auto& [fqn, constant] : constants.members()) {
      const at::Tensor& weight = weights_.at(static_cast<size_t>(constant["weight"].integer()));
      const at::Tensor typed = weight.view(dtype_of(constant["dtype"].text()));
      tensors[fqn] = typed.as_strided(
          constant["shape"].integers(), constant["stride"].integers(),
          typed.storage_offset() + constant["offset"].integer());
    }
    try {
      // Single-threaded: the loader's own events cannot be captured in a CUDA graph.
      auto loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
          path, name, true, 1, device.is_cuda() ? device.index() : -1);
      loader->load_constants(tensors, false, true, true);
      methods_[name] = std::move(loader);
    } catch (const std::exception& error) {
      throw Failure(path + ": " + name + " cannot be loaded: " + first_line(error));
    }
  }
}

void Package::check_device(
    const std::string& path, const std::string& type, const std::string& capability) {
  if (type == "cpu") return;
  if (type != "cuda") throw Failure(path + " was compiled for device " + type + ", unknown here");
#ifdef RUNNER_CUDA
  if (c10::cuda::device_count() == 0)
    throw Failure(path + " was compiled for a CUDA GPU; none is available here");
  device = at::Device(at::kCUDA, c10::cuda::current_device());
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index());
  const size_t dot = capability.find('.');
  if (dot == std::string::npos || std::stoi(capability) != major ||
      std::stoi(capability.substr(dot + 1)) > minor)
    throw Failure(path + " was compiled for compute capability " + capability + "; this GPU has " +
                  std::to_string(major) + "." + std::to_string(minor) +
                  ": export the model on such a GPU");
#else
  (void)capability;
  throw Failure(path + " was compiled for a CUDA GPU; this runner was built with a CPU torch");
#endif
}

at::Tensor Package::run(const std::string& method, const std::vector<at::Tensor>& inputs) {
  const auto found = methods_.find(method);
  if (found == methods_.end()) throw Failure("the package has no method " + method);
  return found->second->run(inputs).at(0);
}
