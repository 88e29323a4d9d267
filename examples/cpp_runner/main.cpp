// Generates tokens from a package of inductor_moe.export_generation, without Python.
#include <c10/core/InferenceMode.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>

#include "session.h"
#include "tokenizer.h"

namespace {

const char* const kUsage = R"(usage: generate --package FILE --prompt-ids IDS [options]
       generate --package FILE --tokenizer FILE --prompt TEXT [options]
  --package FILE        a .pt2 of inductor_moe.export_generation
  --prompt-ids IDS      token ids, separated by commas; for a batch, rows separated by semicolons;
                        @FILE reads them from a file
  --prompt TEXT         in place of --prompt-ids; needs --tokenizer. UTF-8, taken as it is (NFC)
  --tokenizer FILE      a tokenizer.json of byte-level BPE; the generated text is printed, too
  --max-new-tokens N    default 32
  --temperature X       default 0: the most likely token
  --top-p X             in (0, 1], default 1
  --seed N              default 0
  --ignore-eos          go on after an end-of-sequence token
  --sessions N          run N sessions side by side, a token of each in turn; default 1
  --cuda-graph          replay decode as a CUDA graph
  --warmup N --iters N  repeat to time prefill and decode; default 0 and 1
)";

struct Arguments {
  std::string package, prompt_ids, prompt, tokenizer;
  int64_t max_new_tokens = 32, sessions = 1, warmup = 0, iters = 1;
  Sampling sampling;
  bool cuda_graph = false, ignore_eos = false;
};

int64_t integer(const std::string& name, const std::string& text, int64_t least) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno == ERANGE || value < least)
    throw Failure(name + " is '" + text + "'; it must be an integer >= " + std::to_string(least));
  return value;
}

double real(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') throw Failure(name + " is '" + text + "'; it must be a number");
  return value;
}

Arguments parse(int argc, char** argv) {
  Arguments found;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help") {
      std::cout << kUsage;
      std::exit(0);
    }
    if (name == "--cuda-graph") {
      found.cuda_graph = true;
      continue;
    }
    if (name == "--ignore-eos") {
      found.ignore_eos = true;
      continue;
    }
    if (i + 1 >= argc) throw Failure(name + ": unknown, or without its value (see --help)");
    const std::string value = argv[++i];
    if (name == "--package") found.package = value;
    else if (name == "--prompt-ids") found.prompt_ids = value;
    else if (name == "--prompt") found.prompt = value;
    else if (name == "--tokenizer") found.tokenizer = value;
    else if (name == "--max-new-tokens") found.max_new_tokens = integer(name, value, 1);
    else if (name == "--temperature") found.sampling.temperature = real(name, value);
    else if (name == "--top-p") found.sampling.top_p = real(name, value);
    else if (name == "--seed") found.sampling.seed = integer(name, value, INT64_MIN);
    else if (name == "--sessions") found.sessions = integer(name, value, 1);
    else if (name == "--warmup") found.warmup = integer(name, value, 0);
    else if (name == "--iters") found.iters = integer(name, value, 1);
    else throw Failure(name + ": unknown option (see --help)");
  }
  if (found.package.empty()) throw Failure("--package is missing (see --help)");
  if (found.prompt_ids.empty() == found.prompt.empty())
    throw Failure("one of --prompt-ids and --prompt must be given, not both (see --help)");
  if (!found.prompt.empty() && found.tokenizer.empty())
    throw Failure("--prompt needs --tokenizer, a tokenizer.json; or use --prompt-ids");
  const double temperature = found.sampling.temperature, top_p = found.sampling.top_p;
  if (!(temperature >= 0))
    throw Failure("--temperature is " + std::to_string(temperature) + "; it must be 0 or more");
  if (!(top_p > 0 && top_p <= 1))
    throw Failure("--top-p is " + std::to_string(top_p) + "; it must be in (0, 1]");
  return found;
}

// Rows of "1,2,3;4,5,6" as [B, T].
at::Tensor read_prompt(std::string text, const Package& package) {
  if (text[0] == '@') {
    std::FILE* file = std::fopen(text.c_str() + 1, "rb");
    if (!file) throw Failure("--prompt-ids: cannot read " + text.substr(1));
    std::string content;
    for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file))
      if (c != '\n') content.push_back(static_cast<char>(c));
    std::fclose(file);
    text = content;
  }
  std::vector<int64_t> ids;
  int64_t rows = 0, width = -1;
  std::stringstream lines(text);
  for (std::string line; std::getline(lines, line, ';'); ++rows) {
    const size_t before = ids.size();
    std::stringstream cells(line);
    for (std::string cell; std::getline(cells, cell, ',');)
      ids.push_back(integer("--prompt-ids", cell, 0));
    const auto found = static_cast<int64_t>(ids.size() - before);
    if (width >= 0 && found != width) throw Failure("--prompt-ids: rows differ in length");
    width = found;
  }
  if (rows != package.batch_size || width < 1)
    throw Failure("--prompt-ids has " + std::to_string(rows) + " rows; the package takes " +
                  std::to_string(package.batch_size) + ", of at least one token");
  for (const int64_t id : ids)
    if (id >= package.vocab_size)
      throw Failure("--prompt-ids: " + std::to_string(id) + " is outside the vocabulary of " +
                    std::to_string(package.vocab_size));
  return at::tensor(ids, at::kLong).view({rows, width});
}

// Ids of a text as rows that read_prompt reads: the same text for each row of the batch.
std::string spelled(const std::vector<int64_t>& ids, int64_t rows) {
  std::string row, found;
  for (const int64_t id : ids) row += (row.empty() ? "" : ",") + std::to_string(id);
  for (int64_t i = 0; i < rows; ++i) found += (i ? ";" : "") + row;
  return found;
}

// On one line.
std::string quoted(const std::string& text) {
  std::string found;
  for (const char c : text) {
    if (c == '\n') found += "\\n";
    else if (c == '\r') found += "\\r";
    else found.push_back(c);
  }
  return found;
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Timing {
  double prefill = 0, decode = 0;
  int64_t decoded = 0;
};

bool all_ended(const at::Tensor& token, std::vector<char>& ended, const Package& package) {
  bool all = !package.eos_token_ids.empty();
  for (int64_t row = 0; row < token.size(0); ++row) {
    const int64_t id = token[row].item<int64_t>();
    for (const int64_t end : package.eos_token_ids) ended[row] |= id == end;
    all = all && ended[row];
  }
  return all;
}

// Each session's tokens [B, N], a token of each session in turn.
std::vector<at::Tensor> generate(
    std::vector<std::unique_ptr<Session>>& sessions, const Package& package,
    const at::Tensor& prompt, const Arguments& arguments, Timing& timing) {
  const size_t count = sessions.size();
  std::vector<std::vector<at::Tensor>> steps(count);
  std::vector<std::vector<char>> ended(count, std::vector<char>(package.batch_size, 0));
  std::vector<char> done(count, 0);
  const auto keep = [&](size_t s, at::Tensor token) {
    if (!arguments.ignore_eos) done[s] = all_ended(token, ended[s], package);
    steps[s].push_back(std::move(token));
  };
  auto start = Clock::now();
  for (size_t s = 0; s < count; ++s) {
    Sampling sampling = arguments.sampling;
    sampling.seed += static_cast<int64_t>(s);
    sessions[s]->reset();
    sessions[s]->set(sampling);
    keep(s, sessions[s]->prefill(prompt));
  }
  timing.prefill += seconds_since(start);
  start = Clock::now();
  for (int64_t step = 1; step < arguments.max_new_tokens; ++step)
    for (size_t s = 0; s < count; ++s)
      if (!done[s]) {
        keep(s, sessions[s]->decode());
        ++timing.decoded;
      }
  timing.decode += seconds_since(start);
  std::vector<at::Tensor> found;
  for (const auto& tokens : steps) found.push_back(at::stack(tokens, 1));
  return found;
}

void run(const Arguments& arguments) {
  const c10::InferenceMode inference;
  std::unique_ptr<Tokenizer> tokenizer;
  if (!arguments.tokenizer.empty()) tokenizer = std::make_unique<Tokenizer>(arguments.tokenizer);
  Package package(arguments.package);
  const at::Tensor prompt = read_prompt(
      arguments.prompt.empty()
          ? arguments.prompt_ids
          : spelled(tokenizer->encode(arguments.prompt), package.batch_size),
      package);
  if (arguments.sampling.temperature > 0 && package.sampling == "greedy")
    throw Failure("--temperature: the package was exported with sampling='greedy' and takes 0");
  // Not as a sum, which the largest numbers would make negative.
  if (arguments.max_new_tokens > package.max_seq_len + 1 - prompt.size(1))
    throw Failure("a prompt of " + std::to_string(prompt.size(1)) + " and " +
                  std::to_string(arguments.max_new_tokens) +
                  " new tokens need more room than the package's max_seq_len " +
                  std::to_string(package.max_seq_len));
  std::vector<std::unique_ptr<Session>> sessions;
  for (int64_t s = 0; s < arguments.sessions; ++s)
    sessions.push_back(std::make_unique<Session>(package, arguments.cuda_graph));

  Timing ignored, timing;
  for (int64_t i = 0; i < arguments.warmup; ++i)
    generate(sessions, package, prompt, arguments, ignored);
  std::vector<at::Tensor> tokens;
  for (int64_t i = 0; i < arguments.iters; ++i)
    tokens = generate(sessions, package, prompt, arguments, timing);

  for (size_t s = 0; s < tokens.size(); ++s)
    for (int64_t row = 0; row < package.batch_size; ++row) {
      std::cout << "session " << s << " row " << row << ":";
      std::vector<int64_t> ids;
      for (int64_t i = 0; i < tokens[s].size(1); ++i) {
        ids.push_back(tokens[s][row][i].item<int64_t>());
        std::cout << ' ' << ids.back();
      }
      std::cout << '\n';
      if (tokenizer)
        std::cout << "text " << s << ' ' << row << ": " << quoted(tokenizer->decode(ids)) << '\n';
    }
  const double prompts =
      static_cast<double>(prompt.numel() * arguments.sessions * arguments.iters);
  std::printf("prefill %.1f tokens/s\n", prompts / timing.prefill);
  if (timing.decoded)
    std::printf("decode %.1f tokens/s\n",
                static_cast<double>(timing.decoded * package.batch_size) / timing.decode);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << "generate: " << first_line(error) << '\n';
    return 1;
  }
  return 0;
}
