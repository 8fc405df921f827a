// Verification: what it says in words, of numbers that are given here.
#include "helpers.hpp"

#include <microreg/format.hpp>
#include <microreg/verification.hpp>

#include <sstream>
#include <string>

using namespace helpers;

namespace {

/// A network without a problem: two penalties, one of whose values is not known.
microreg::Verification sample_verification() {
  microreg::Verification found;
  found.samples = 1000;
  found.micro_batches = 8;
  found.micro_batch_samples = 128;
  found.where = "float32 on cpu";
  found.loss = 2.30259;
  found.loss_gradient_norm = 0.5;
  found.penalties = {{.name = "gradient_norm", .strength = 0.01, .value = 0.25, .gradient_norm = 3.0},
                     {.name = "mine", .strength = 2.0}};
  found.gradient_ratio = 0.06;
  found.strength_for_a_tenth = 0.0166667;
  found.strength_for_one = 0.166667;
  found.fused_error = 1.5e-7;
  found.difference = "ForwardDifference";
  found.difference_error = 0.0021;
  found.parameters = {{.name = "weight", .loss = true, .selected = true, .penalty = true},
                      {.name = "bias", .loss = true, .selected = true}};
  found.plain = {.seconds = 0.02, .peak_bytes = 4'000'000};
  found.exact_cost = {.seconds = 0.056, .peak_bytes = 6'000'000};
  found.difference_cost = {.seconds = 1.2, .peak_bytes = 999};
  found.fused = {{"convolution_backward", 2}, {"gelu_backward", 1}};
  return found;
}

}  // namespace

TEST_CASE("a verification in words, line by line", "[verification]") {
  const microreg::Verification found = sample_verification();
  CHECK(found.ok());
  CHECK(
      found.text() ==
      "verify      micro-batch 0 of 8, 128 of 1000 samples, float32 on cpu: no problem\n"
      "loss        2.3, norm of its gradient 0.5\n"
      "penalty     gradient_norm 0.25 (x 0.01), norm of its gradient 3\n"
      "penalty     mine not known (x 2)\n"
      "strength    penalties move the gradient by 0.06 of the loss gradient's norm; strengths for 0.1 to 1: 0.0167 to "
      "0.167\n"
      "exact       goes through; fused against LibTorch's own 1.5e-07\n"
      "difference  ForwardDifference against exact 0.0021\n"
      "parameters  2 trained, all of which take part\n"
      "time        plain 20 ms, exact 56 ms (x 2.8), ForwardDifference 1.2 s (x 60)\n"
      "memory      plain 4 MB, exact 6 MB (x 1.5), ForwardDifference 999 bytes (x 0.00025)\n"
      "fused       3: convolution_backward (x 2), gelu_backward\n"
      "stock       nothing");
  std::ostringstream out;
  out << found;
  CHECK(out.str() == found.text());
  CHECK(fmt::format("{}", found) == found.text());
}

TEST_CASE("a verification names what is refused, who takes no part, and problems before notes", "[verification]") {
  microreg::Verification found = sample_verification();
  found.exact_refusal = "an operation has no second derivative";
  found.missing = {{"_cdist_backward", "behind parameter weight", "take differences"}, {"a sentence", "", "freeze it"}};
  found.exact_cost.reset();
  found.difference_error.reset();
  found.not_frozen = {"renorm"};
  found.functions = {"a", "b", "c", "d", "e", "f", "g"};
  found.parameters = {{.name = "unused"},
                      {.name = "left_out", .loss = true},
                      {.name = "still", .loss = true, .selected = true, .penalty = false},
                      {.name = "frozen", .frozen = true}};
  found.problems = {"Exact is refused", "another one"};
  found.notes = {"batch normalisation"};
  CHECK_FALSE(found.ok());
  const std::string text = found.text();
  CHECK(has(
      text,
      {"float32 on cpu: 2 problems\n", "exact       refused: an operation has no second derivative\n",
       "  missing   _cdist_backward behind parameter weight: take differences\n", "  missing   a sentence: freeze it\n",
       "difference  ForwardDifference agrees with itself at twice its displacement, exact is not to be had\n",
       "  not frozen renorm\n", "  functions a, b, c, d, e and 2 more\n",
       "parameters  3 trained; unused by the loss: unused; not counted by select: unused, left_out; not moved by the "
       "penalties: still; frozen: frozen\n",
       "time        plain 20 ms, ForwardDifference 1.2 s (x 60)\n",
       "problem     Exact is refused\nproblem     another one\nnote        batch normalisation"}));
  found.difference_refusal = "renorm cannot be frozen";
  CHECK(has(found.text(), {"difference  ForwardDifference refused: renorm cannot be frozen\n"}));
  found.exact_refusal.clear();
  found.other_refusal = "no formula";
  CHECK(has(found.text(), {"exact       goes through; fused against LibTorch's own 1.5e-07; with the other value of "
                           ".fused it is refused: no formula\n"}));
}
