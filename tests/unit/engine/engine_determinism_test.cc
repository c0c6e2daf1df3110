// The engine over the CPU backend: company, cancels and slow readers change no token.
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "server/backends/cpu/cpu_backend.h"
#include "server/engine/engine.h"
#include "tests/support/collecting_sink.h"
#include "tests/support/fake_model.h"

namespace mmfree {
namespace {

struct Outcome {
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  bool finished = false;
};

class EngineDeterminismTest : public ::testing::Test {
 protected:
  EngineDeterminismTest() {
    ModelConfig config;
    config.vocab_size = 300;
    config.hidden_size = 64;
    config.intermediate_size = 192;
    config.num_layers = 2;
    model_ = Model::Random(config, 1);
    std::mt19937 random(7);
    for (int i = 0; i < 1000; ++i) {
      GenerationRequest request;
      const int prompt = 1 + static_cast<int>(random() % 40);
      for (int t = 0; t < prompt; ++t)
        request.prompt.push_back(static_cast<int32_t>(random() % 300));
      request.max_new_tokens = 1 + random() % 30;
      if (i % 3 != 0) {
        request.sampling.temperature = 0.5f + 0.1f * static_cast<float>(i % 10);
        request.sampling.seed = random();
      }
      request.eos_token_ids = {2};
      if (i % 4 == 0) request.min_new_tokens = 5;
      request.stop_token_ids = {static_cast<int32_t>(random() % 300)};
      request.priority = static_cast<Priority>(random() % 3);
      request.caller = std::string(1, static_cast<char>('a' + random() % 4));
      requests_.push_back(request);
    }
  }

  std::unique_ptr<Engine> MakeEngine(int32_t threads, int32_t chunk) {
    CpuBackendOptions backend_options;
    backend_options.threads = threads;
    backend_options.num_slots = 12;
    auto backend = CreateCpuBackend(model_, backend_options);
    EXPECT_TRUE(backend.ok()) << backend.status();
    Engine::Options options;
    options.model_name = "random";
    options.prefill_chunk = chunk;
    options.step_token_budget = 48;
    options.max_stream_backlog = 8;
    auto engine = Engine::Create(options, model_, std::make_shared<FakeTokenizer>(),
                                 *std::move(backend), metrics_.get());
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  }

  static Outcome Collect(CollectingSink* sink) {
    Outcome outcome;
    outcome.finished = sink->WaitForEnd().ok();
    for (const SampledToken& token : sink->tokens()) {
      outcome.ids.push_back(token.token);
      outcome.logprobs.push_back(token.logprob);
    }
    return outcome;
  }

  std::shared_ptr<const Model> model_;
  std::vector<GenerationRequest> requests_;
  prometheus::Registry registry_;
  std::unique_ptr<Metrics> metrics_ = Metrics::Create(&registry_);
};

TEST_F(EngineDeterminismTest, RequestsThatFinishInCompanyGetTheSameBytesAsAlone) {
  std::vector<Outcome> alone;
  {
    const std::unique_ptr<Engine> engine = MakeEngine(1, 256);
    for (const GenerationRequest& request : requests_) {
      auto sink = std::make_shared<CollectingSink>();
      ASSERT_TRUE(engine->Submit(request, sink).ok());
      alone.push_back(Collect(sink.get()));
      ASSERT_TRUE(alone.back().finished);
    }
  }
  for (const int32_t chunk : {3, 64}) {
    const std::unique_ptr<Engine> engine = MakeEngine(2, chunk);
    std::mt19937 random(chunk);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    std::vector<RequestHandle> handles;
    for (const GenerationRequest& request : requests_) {
      sinks.push_back(std::make_shared<CollectingSink>(
          random() % 3 == 0 ? CollectingSink::Reader::kIdle : CollectingSink::Reader::kEager));
      const auto handle = engine->Submit(request, sinks.back());
      ASSERT_TRUE(handle.ok()) << handle.status();
      handles.push_back(*handle);
      if (random() % 8 == 0) engine->Cancel(handles[random() % handles.size()]);
    }
    for (const auto& sink : sinks) sink->StartReading();
    int finished = 0;
    for (size_t i = 0; i < sinks.size(); ++i) {
      const Outcome together = Collect(sinks[i].get());
      if (!together.finished) continue;
      ++finished;
      EXPECT_EQ(together.ids, alone[i].ids) << "request " << i;
      EXPECT_EQ(together.logprobs, alone[i].logprobs) << "request " << i;
    }
    EXPECT_GT(finished, 500);
  }
}

}  // namespace
}  // namespace mmfree
