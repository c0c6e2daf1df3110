#include "server/prefix_cache/radix_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

namespace mmfree {
namespace {

using Tokens = std::vector<int32_t>;

struct Number {
  int value = 0;
  bool empty() const { return value == 0; }
};
using Tree = RadixTree<Number>;

int64_t CommonLength(const Tokens& a, const Tokens& b) {
  return std::mismatch(a.begin(), a.begin() + static_cast<ptrdiff_t>(std::min(a.size(), b.size())),
                       b.begin())
             .first -
         a.begin();
}

// Few tokens and short sequences, so that they share, end in each other and part everywhere.
Tokens RandomTokens(std::mt19937* random) {
  Tokens tokens;
  const size_t size = 1 + (*random)() % 12;
  while (tokens.size() < size) tokens.push_back(static_cast<int32_t>((*random)() % 2));
  return tokens;
}

TEST(RadixTreeTest, HoldsWhatAMapOfSequencesHoldsWithTheFewestNodes) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    Tree tree;
    std::map<Tokens, Tree::Node*> held;
    for (int i = 0; i < 400; ++i) {
      const Tokens tokens = RandomTokens(&random);
      // Grows, then shrinks until nothing is left.
      const bool inserts = i < 200 ? random() % 3 != 0 : random() % 4 == 0;
      if (inserts) {
        Tree::Node* const node = tree.Insert(tokens);
        node->value.value = i + 1;
        // A node with a value keeps its address.
        EXPECT_EQ(held.emplace(tokens, node).first->second, node);
      } else if (!held.empty()) {
        auto victim = held.lower_bound(tokens);
        if (victim == held.end()) victim = held.begin();
        victim->second->value.value = 0;
        tree.Prune(victim->second);
        held.erase(victim);
      }

      const Tokens wanted = RandomTokens(&random);
      const Tree::Match match = tree.Find(wanted);
      int64_t common = 0;
      for (const auto& [other, node] : held) common = std::max(common, CommonLength(wanted, other));
      ASSERT_EQ(match.length, common);
      ASSERT_LE(match.node->length, common);
      ASSERT_EQ(match.below == nullptr, match.node->length == common);
      if (held.count(wanted) > 0) {
        EXPECT_EQ(match.node, held[wanted]);
      }
      // Each node is a held sequence or a place where two part.
      ASSERT_LE(tree.nodes(), std::max<int64_t>(0, 2 * static_cast<int64_t>(held.size()) - 1));
      ASSERT_EQ(tree.empty(), held.empty());
    }
    int64_t most = 0;
    for (const auto& [tokens, node] : held) most += static_cast<int64_t>(tokens.size());
    EXPECT_LE(tree.tokens(), most);
  }
}

TEST(RadixTreeTest, CountsTheTokensOfSharedPrefixesOnce) {
  Tree tree;
  tree.Insert({1, 2, 3, 4})->value.value = 1;
  tree.Insert({1, 2, 3, 5, 6})->value.value = 2;
  EXPECT_EQ(tree.tokens(), 3 + 1 + 2);
  EXPECT_EQ(tree.nodes(), 3);
  Tree::Node* const last = tree.Find({1, 2, 3, 5, 6}).node;
  last->value.value = 0;
  tree.Prune(last);
  EXPECT_EQ(tree.tokens(), 4);
  EXPECT_EQ(tree.nodes(), 1);
}

TEST(RadixTreeTest, AChainOfNodesIsFreedWithoutRecursion) {
  Tree tree;
  Tokens tokens;
  for (int i = 0; i < 2000; ++i) {
    tokens.insert(tokens.end(), 4, i);
    tree.Insert(tokens)->value.value = 1;
  }
  EXPECT_EQ(tree.nodes(), 2000);
}

}  // namespace
}  // namespace mmfree
