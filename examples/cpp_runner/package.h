// A package of inductor_moe.export_generation: its methods, and one set of weights for all of them.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "failure.h"

struct State {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

class Package {
 public:
  // Throws Failure for a file that is missing, damaged, of another format or for another device.
  explicit Package(const std::string& path);

  // Runs "prefill" or "decode" on the current stream; the states among the inputs are updated.
  at::Tensor run(const std::string& method, const std::vector<at::Tensor>& inputs);

  at::Device device = at::kCPU;
  int64_t batch_size = 0, max_seq_len = 0, vocab_size = 0;
  std::vector<int64_t> eos_token_ids;
  std::string sampling = "top_p";  // or "greedy": temperature, top_p and uniforms are not read
  std::vector<State> states;

 private:
  std::vector<at::Tensor> weights_;  // the methods do not own them
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> methods_;

  void check_device(const std::string& path, const std::string& type, const std::string& capability);
};

// The first line of an error, without a backtrace.
std::string first_line(const std::exception& error);
