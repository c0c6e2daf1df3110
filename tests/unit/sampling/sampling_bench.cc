// Cost of each sampling feature, per token, at the published models' vocabulary.
//   build/release/bin/sampling_bench
#include <benchmark/benchmark.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "server/sampling/constraint.h"
#include "server/sampling/json_schema.h"
#include "server/sampling/request_sampler.h"
#include "server/sampling/sampler.h"
#include "server/sampling/stop_strings.h"

namespace mmfree {
namespace {

constexpr int32_t kVocab = 32'000;

// Logits about as spread out as a language model's.
const std::vector<float>& Logits() {
  static const auto* const kLogits = [] {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    auto* logits = new std::vector<float>(kVocab);
    for (float& logit : *logits) logit = normal(random);
    return logits;
  }();
  return *kLogits;
}

SamplingParams Params() {
  SamplingParams params;
  params.temperature = 0.8f;
  params.seed = 1;
  return params;
}

void RunSampler(benchmark::State& state, RequestSampler::Options options) {
  options.logprobs = options.top_logprobs > 0 ? options.logprobs : RequestSampler::Logprobs::kNone;
  RequestSampler sampler(std::move(options), kVocab, std::vector<int32_t>(64, 7));
  uint64_t position = 0;
  for (auto _ : state) {
    SampledToken token = sampler.Sample(Logits(), Params(), position++);
    benchmark::DoNotOptimize(token.token);
    sampler.Append(token.token);
  }
}

void BM_TemperatureOnly(benchmark::State& state) {  // the scalar definition, for comparison
  uint64_t position = 0;
  for (auto _ : state) benchmark::DoNotOptimize(Sample(Logits(), Params(), position++).token);
}
BENCHMARK(BM_TemperatureOnly);

void BM_BannedIds(benchmark::State& state) {
  RequestSampler::Options options;
  options.banned = {5, 6, 7};
  RunSampler(state, options);
}
BENCHMARK(BM_BannedIds);

void BM_AllowedIds(benchmark::State& state) {
  RequestSampler::Options options;
  for (int32_t id = 0; id < 100; ++id) options.allowed.push_back(100 * id);
  RunSampler(state, options);
}
BENCHMARK(BM_AllowedIds);

void BM_LogitBias(benchmark::State& state) {
  RequestSampler::Options options;
  options.bias = {{5, 1.0f}};
  RunSampler(state, options);
}
BENCHMARK(BM_LogitBias);

void BM_Penalties(benchmark::State& state) {
  RequestSampler::Options options;
  options.penalties = {1.1f, 64, 0.1f, 0.1f};
  RunSampler(state, options);
}
BENCHMARK(BM_Penalties);

void BM_TopK(benchmark::State& state) {
  RequestSampler::Options options;
  options.filters.top_k = 40;
  RunSampler(state, options);
}
BENCHMARK(BM_TopK);

void BM_TypicalP(benchmark::State& state) {
  RequestSampler::Options options;
  options.filters.typical_p = 0.9f;
  RunSampler(state, options);
}
BENCHMARK(BM_TypicalP);

void BM_TopP(benchmark::State& state) {
  RequestSampler::Options options;
  options.filters.top_p = 0.9f;
  RunSampler(state, options);
}
BENCHMARK(BM_TopP);

void BM_MinP(benchmark::State& state) {
  RequestSampler::Options options;
  options.filters.min_p = 0.05f;
  RunSampler(state, options);
}
BENCHMARK(BM_MinP);

void BM_EveryFilterAndPenalty(benchmark::State& state) {
  RequestSampler::Options options;
  options.penalties = {1.1f, 64, 0.1f, 0.1f};
  options.filters = {400, 0.95f, 0.9f, 0.01f};
  RunSampler(state, options);
}
BENCHMARK(BM_EveryFilterAndPenalty);

void BM_TopLogprobs(benchmark::State& state) {
  RequestSampler::Options options;
  options.logprobs = RequestSampler::Logprobs::kModel;
  options.top_logprobs = 5;
  RunSampler(state, options);
}
BENCHMARK(BM_TopLogprobs);

void BM_StopStrings(benchmark::State& state) {
  std::vector<std::string> strings;
  for (int i = 0; i < 64; ++i) strings.push_back("\n\nStop " + std::to_string(i));
  const StopStrings automaton(strings);
  StopStrings::Node node = StopStrings::kStart;
  const std::string token = " story";
  for (auto _ : state) {
    for (const char byte : token) node = automaton.Next(node, byte);
    benchmark::DoNotOptimize(node);
  }
}
BENCHMARK(BM_StopStrings);

// All bytes, and random pieces of letters.
Vocabulary MakeVocabulary() {
  std::mt19937 random(2);
  std::vector<std::string> bytes(3);
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(std::string(1, static_cast<char>(byte)));
  while (bytes.size() < kVocab) {
    std::string piece = random() % 2 == 0 ? " " : "";
    for (size_t n = 1 + random() % 8; n > 0; --n) {
      piece.push_back("etaoinshrdlu{}[]\",:0123456789"[random() % 29]);
    }
    bytes.push_back(piece);
  }
  const auto trie = std::make_shared<const TokenTrie>(bytes);
  return {trie, trie};
}

constexpr char kSchema[] =
    R"({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}}}, "required": ["name"]})";

void BM_JsonSchemaCompile(benchmark::State& state) {
  const Vocabulary vocabulary = MakeVocabulary();
  for (auto _ : state) {
    ConstraintCache cache([&vocabulary] { return vocabulary; });
    benchmark::DoNotOptimize(cache.Compile(ConstraintCache::Kind::kJsonSchema, kSchema));
  }
}
BENCHMARK(BM_JsonSchemaCompile);

// A state seen for the first time: the walk over the vocabulary, inside a string.
void BM_MaskFirstTime(benchmark::State& state) {
  ConstraintCache cache(MakeVocabulary);
  const Grammar grammar = *GrammarOfJsonSchema(kSchema);
  const Vocabulary vocabulary = MakeVocabulary();
  for (auto _ : state) {
    CompiledConstraint constraint(grammar, vocabulary);
    CompiledConstraint::State at = constraint.start();
    for (const char byte : std::string("{\"name\":\"")) {
      at = constraint.Advance(at, 3 + static_cast<unsigned char>(byte), false);
    }
    benchmark::DoNotOptimize(constraint.Mask(at, false));
  }
}
BENCHMARK(BM_MaskFirstTime);

// Whole outputs under a constraint, so that states repeat as they do in use. Sampling included.
void BM_ConstrainedToken(benchmark::State& state, ConstraintCache::Kind kind, const char* text) {
  ConstraintCache cache(MakeVocabulary);
  const auto constraint = *cache.Compile(kind, text);
  uint64_t position = 0;
  for (auto _ : state) {
    state.PauseTiming();
    RequestSampler::Options options;
    options.constraint = constraint;
    options.end_tokens = {2};
    options.logprobs = RequestSampler::Logprobs::kNone;
    RequestSampler sampler(options, kVocab, {});
    state.ResumeTiming();
    for (int i = 0; i < 32; ++i) {
      const int32_t token = sampler.Sample(Logits(), Params(), position++).token;
      if (token < 3) break;
      sampler.Append(token);
    }
  }
  state.counters["per_token"] = benchmark::Counter(
      32, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}
BENCHMARK_CAPTURE(BM_ConstrainedToken, json_schema, ConstraintCache::Kind::kJsonSchema, kSchema);
BENCHMARK_CAPTURE(BM_ConstrainedToken, regex, ConstraintCache::Kind::kRegex,
                  "([a-z]+ ){4}[A-Z][a-z]*[.!?]");
BENCHMARK_CAPTURE(BM_ConstrainedToken, grammar, ConstraintCache::Kind::kGrammar,
                  "root ::= e\ne ::= t ([-+] t)*\nt ::= [0-9]+ | \"(\" e \")\"");

}  // namespace
}  // namespace mmfree
