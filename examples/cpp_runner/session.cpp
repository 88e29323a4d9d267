#include "session.h"

#ifdef RUNNER_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

struct Session::Graph {
  at::cuda::CUDAGraph graph;
};
#else
struct Session::Graph {};
#endif

namespace {

// Entry i is the top 24 bits of the output i + 1 of splitmix64, as in inductor_moe/aoti/random.py.
at::Tensor uniforms(int64_t seed, int64_t rows, int64_t columns) {
  at::Tensor found = at::empty({rows, columns}, at::kFloat);
  float* values = found.data_ptr<float>();
  auto state = static_cast<uint64_t>(seed);
  for (int64_t i = 0; i < rows * columns; ++i) {
    state += 0x9E3779B97F4A7C15ULL;
    uint64_t mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ULL;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
    values[i] = static_cast<float>((mixed ^ (mixed >> 31)) >> 40) * 0x1p-24f;
  }
  return found;
}

}  // namespace

Session::Session(Package& package, bool cuda_graph) : package_(package), cuda_graph_(cuda_graph) {
  if (cuda_graph && !package.device.is_cuda())
    throw Failure("--cuda-graph: the package was compiled for " + package.device.str());
  const int64_t batch = package.batch_size;
  const auto floats = at::TensorOptions(at::kFloat).device(package.device);
  token_ = at::zeros({batch, 1}, floats.dtype(at::kLong));
  sampling_ = {
      at::zeros({batch}, floats), at::ones({batch}, floats),
      at::zeros({batch, package.max_seq_len + 1}, floats)};
  for (const State& state : package.states)
    states_.push_back(at::zeros(state.shape, floats.dtype(state.dtype)));
}

Session::~Session() = default;

void Session::reset() {
  for (at::Tensor& state : states_) state.zero_();
  tokens_used = 0;
}

void Session::set(const Sampling& sampling) {
  sampling_[0].fill_(sampling.temperature);
  sampling_[1].fill_(sampling.top_p);
  if (sampling.temperature > 0)
    sampling_[2].copy_(uniforms(sampling.seed, package_.batch_size, package_.max_seq_len + 1));
}

at::Tensor Session::run(const std::string& method, const at::Tensor& tokens) {
  std::vector<at::Tensor> inputs = {tokens};
  inputs.insert(inputs.end(), sampling_.begin(), sampling_.end());
  inputs.insert(inputs.end(), states_.begin(), states_.end());
  return package_.run(method, inputs);
}

at::Tensor Session::prefill(const at::Tensor& prompt) {
  tokens_used += prompt.size(1);
  if (prompt.size(1) == 1) {
    token_.copy_(prompt);
    return run_decode();
  }
  const at::Tensor token = run("prefill", prompt.to(package_.device));
  token_.copy_(token.unsqueeze(1));
  return token.cpu();
}

at::Tensor Session::decode() {
  ++tokens_used;
  return run_decode();
}

at::Tensor Session::run_decode() {
  if (!cuda_graph_) {
    run("decode", token_);
  } else {
#ifdef RUNNER_CUDA
    if (!graph_) capture();
    graph_->graph.replay();
#endif
  }
  return token_.select(1, 0).to(at::kCPU, token_.scalar_type(), false, /*copy=*/true);
}

void Session::capture() {
#ifdef RUNNER_CUDA
  std::vector<at::Tensor> kept = {token_.clone()};
  for (const at::Tensor& state : states_) kept.push_back(state.clone());
  auto graph = std::make_unique<Graph>();
  c10::cuda::device_synchronize();
  {
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
    for (int i = 0; i < 2; ++i) {
      states_[0].zero_();  // the position: a warm-up step always has room
      run("decode", token_);
    }
    c10::cuda::device_synchronize();
    graph->graph.capture_begin();
    run("decode", token_);
    graph->graph.capture_end();
  }
  c10::cuda::device_synchronize();
  token_.copy_(kept[0]);
  for (size_t i = 0; i < states_.size(); ++i) states_[i].copy_(kept[i + 1]);
  graph_ = std::move(graph);
#endif
}
