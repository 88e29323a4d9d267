// The states of one conversation over a package. Sessions are independent of each other.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "package.h"

struct Sampling {
  double temperature = 0, top_p = 1;
  int64_t seed = 0;
};

class Session {
 public:
  // cuda_graph: replay decode as a CUDA graph after one warm-up and one capture.
  Session(Package& package, bool cuda_graph);
  ~Session();

  // Forget every token.
  void reset();
  void set(const Sampling& sampling);
  // Append a prompt [B, T] on the CPU; returns the next token [B] on the CPU.
  at::Tensor prefill(const at::Tensor& prompt);
  // The token after the last one.
  at::Tensor decode();

  int64_t tokens_used = 0;

 private:
  struct Graph;
  Package& package_;
  bool cuda_graph_;
  at::Tensor token_;                   // [B, 1]: decode reads it and overwrites it
  std::vector<at::Tensor> sampling_;   // temperature, top_p, uniforms
  std::vector<at::Tensor> states_;
  std::unique_ptr<Graph> graph_;

  at::Tensor run(const std::string& method, const at::Tensor& tokens);
  at::Tensor run_decode();
  void capture();
};
