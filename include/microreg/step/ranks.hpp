/// @file
/// One step of several ranks: what they tell each other, so that all of them take it or none does.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <microreg/detail/hash.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/plain_tensors.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/distributed/communicator.hpp>
#include <microreg/error.hpp>
#include <microreg/micro_batches.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/snapshot.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// How a rank has fared.
enum class Fared { well, failed, not_finite, to_be_skipped };

/// The ranks that take a step together, or this process alone, for which nothing here does anything.
///
/// A step has three exchanges of a few numbers: `enter` (who has how many samples, and whether all ranks are about the
/// same step), `agree` (how the passes went, and what is to be added up), and `commit` (whether everything has arrived
/// everywhere), behind which nothing fails any more. A rank on which something is thrown takes part in the next of them
/// all the same, by `leave`, so that the others need not wait for it, and throw as well. All ranks see the same numbers
/// and decide by these alone, so they decide alike.
class Ranks {
 public:
  Ranks(Communicator* communicator, std::int64_t step) : communicator_(communicator), step_(step) {
    if (communicator_ != nullptr) {
      size_ = static_cast<std::size_t>(communicator_->size());
      rank_ = static_cast<std::size_t>(communicator_->rank());
    }
  }

  [[nodiscard]] bool alone() const noexcept { return communicator_ == nullptr; }
  /// Of the micro-batches and samples of all ranks, and the counts of a CountedLoss.
  [[nodiscard]] std::int64_t micro_batches() const noexcept { return micro_batches_; }
  [[nodiscard]] std::int64_t samples() const noexcept { return samples_; }
  [[nodiscard]] double counts() const noexcept { return counts_; }

  /// What this rank is about.
  struct Task {
    const RegularizerOptions& options;
    const Parameters& parameters;
    const std::vector<NamedParameter>& all_parameters;  ///< frozen ones too
    const std::vector<at::Tensor>& buffers;
    const MiniBatch& batch;
    const std::vector<double>& strengths;
    SnapshotMemory* memory;  ///< null where parameters need not be made equal
  };

  /// Tells the others, and learns where `parts` stand among the micro-batches of all. In the first step, overwrites
  /// parameters, frozen ones too, and buffers with those of rank 0. Throws on all ranks if one of them failed before,
  /// or is about something else.
  void enter(const Task& task, std::vector<Part>& parts) {
    if (alone()) {
      micro_batches_ = parts.front().count;
      for (const Part& part : parts) {
        samples_ += part.size;
      }
      return;
    }
    parameters_ = task.parameters.tensors.size();
    buffers_ = task.buffers.size();
    generators_.emplace(devices_of(task.parameters.tensors), task.options.generator);
    Words own(static_cast<std::size_t>(Entry::words));
    const auto set = [&](Entry entry, double value) { own[static_cast<std::size_t>(entry)] = value; };
    double samples = 0;
    for (const Part& part : parts) {
      samples += static_cast<double>(part.size);
    }
    const bool first = task.memory != nullptr && !task.memory->alike;
    const auto [sum, magnitude] = checksum(task);
    set(Entry::micro_batches, static_cast<double>(parts.size()));
    set(Entry::samples, samples);
    set(Entry::step, static_cast<double>(step_));
    set(Entry::shapes, shapes_of(task));
    const std::vector<Setting> settings = settings_of(task);
    for (std::size_t i = 0; i < settings.size(); ++i) {
      own[static_cast<std::size_t>(Entry::settings) + i] = settings[i].value;
    }
    set(Entry::first, first ? 1 : 0);
    set(Entry::sum, sum);
    set(Entry::magnitude, magnitude);
    const auto digests = generators_->digests();
    for (std::size_t i = 0; i < std::min(digests.size(), watched_generators); ++i) {
      own[static_cast<std::size_t>(Entry::states) + i] = as_word(digests[i].state);
      own[static_cast<std::size_t>(Entry::generators) + i] = identity_of(digests[i].generator);
    }
    meet(std::move(own), call_);
    const auto of = [&](std::size_t rank, Entry entry) { return entered_[rank][static_cast<std::size_t>(entry)]; };
    for (std::size_t r = 1; r < size_; ++r) {
      require_same_task(r, of, settings);
    }
    std::int64_t before = 0;
    bool any_first = false;
    for (std::size_t r = 0; r < size_; ++r) {
      before += r < rank_ ? static_cast<std::int64_t>(of(r, Entry::micro_batches)) : 0;
      micro_batches_ += static_cast<std::int64_t>(of(r, Entry::micro_batches));
      samples_ += static_cast<std::int64_t>(of(r, Entry::samples));
      any_first = any_first || of(r, Entry::first) > 0;
    }
    if (samples_ == 0) {
      throw BatchError(text({"the mini-batch is empty on each of ", size_, " ranks; skip it"}));
    }
    for (Part& part : parts) {
      part.index += before;
      part.count = micro_batches_;
      part.weight = weight_of(task.options.weighting, part.size, samples_, micro_batches_);
    }
    if (any_first) {
      phase_ = Phase::reducing;
      make_equal(task);
    } else {
      for (std::size_t r = 1; r < size_; ++r) {
        require_same_values(r, of);
      }
    }
    if (task.memory != nullptr) {
      task.memory->alike = true;
    }
    phase_ = Phase::computing;
  }

  /// For reduced(), which takes no step: the numbers of each rank.
  std::vector<std::vector<double>> meet_for_report(const std::vector<double>& numbers) {
    Words own(static_cast<std::size_t>(Entry::words));
    const auto first = static_cast<std::size_t>(Entry::settings);
    std::copy(numbers.begin(), numbers.end(), own.begin() + static_cast<std::ptrdiff_t>(first));
    meet(std::move(own), Call::reduced);
    std::vector<std::vector<double>> result;
    for (const Words& words : entered_) {
      const auto begin = words.begin() + static_cast<std::ptrdiff_t>(first);
      result.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(numbers.size()));
    }
    return result;
  }

  /// What the passes of this rank came to.
  struct Outcome {
    Fared fared = Fared::well;
    std::vector<std::vector<at::Tensor>*> sums;  ///< lists of one tensor a parameter, undefined where it took no part
    std::vector<bool> moved;                     ///< whether the step has changed a buffer
    std::optional<double> counts;                ///< of a CountedLoss
    bool uncounted = false;                      ///< there were losses of another kind
    double factor = 1;                           ///< Proof::factor; becomes the largest
    bool overflowed = false;                     ///< under a loss scale that follows; becomes whether on any rank
  };

  /// Tells the others how the passes went. Sums that a parameter has on some rank are defined afterwards, as zero where
  /// they were not; `moved` is true where it is on some rank. Whether the step is to be skipped. Throws on all ranks if
  /// the passes failed on one of them.
  bool agree(Outcome& outcome) {
    if (alone()) {
      counts_ = outcome.counts.value_or(0);
      return outcome.fared == Fared::to_be_skipped;
    }
    Words own(static_cast<std::size_t>(Passed::words));
    const auto set = [&](Passed entry, double value) { own[static_cast<std::size_t>(entry)] = value; };
    own.front() = static_cast<double>(outcome.fared);
    set(Passed::factor, outcome.factor);
    set(Passed::counts, outcome.counts.value_or(0));
    set(Passed::counted, outcome.counts.has_value() ? 1 : 0);
    set(Passed::uncounted, outcome.uncounted ? 1 : 0);
    set(Passed::overflowed, outcome.overflowed ? 1 : 0);
    const auto digests = generators_->digests();
    for (std::size_t i = 0; i < std::min(digests.size(), watched_generators); ++i) {
      own[static_cast<std::size_t>(Passed::drew) + i] = digests[i].moved ? 1 : 0;
    }
    Words shared = no_flags(outcome.sums.size());
    for (std::size_t k = 0; k < outcome.sums.size(); ++k) {
      for (std::size_t i = 0; i < parameters_; ++i) {
        shared[k * parameters_ + i] = (*outcome.sums[k])[i].defined() ? 1 : 0;
      }
    }
    for (std::size_t i = 0; i < buffers_; ++i) {
      shared[shared.size() - buffers_ + i] = outcome.moved[i] ? 1 : 0;
    }
    const Table passed = gather(own, shared);
    const bool skipped = settle(Phase::away);
    require_independent_draws(passed);
    double uncounted = 0, counted = 0;
    for (const Words& words : passed) {
      counts_ += words[static_cast<std::size_t>(Passed::counts)];
      counted += words[static_cast<std::size_t>(Passed::counted)];
      uncounted += words[static_cast<std::size_t>(Passed::uncounted)];
      outcome.overflowed = outcome.overflowed || words[static_cast<std::size_t>(Passed::overflowed)] > 0;
      outcome.factor = std::max(outcome.factor, words[static_cast<std::size_t>(Passed::factor)]);
    }
    if (counted > 0 && uncounted > 0) {
      throw ModelError("the loss returned a CountedLoss on some ranks and not on others");
    }
    for (std::size_t k = 0; k < outcome.sums.size(); ++k) {
      taking_part_.emplace_back();
      for (std::size_t i = 0; i < parameters_; ++i) {
        taking_part_.back().push_back(shared_[k * parameters_ + i] > 0);
      }
    }
    for (std::size_t i = 0; i < buffers_; ++i) {
      outcome.moved[i] = shared_[shared_.size() - buffers_ + i] > 0;
    }
    phase_ = Phase::reducing;
    return skipped;
  }

  /// Adds lists of sums up over all ranks, those of the last parameters first.
  void add_up(const std::vector<std::vector<at::Tensor>*>& sums, const std::vector<at::Tensor>& parameters) {
    if (alone()) {
      return;
    }
    std::vector<at::Tensor*> tensors;
    for (std::size_t k = 0; k < sums.size(); ++k) {
      for (std::size_t i = 0; i < parameters.size(); ++i) {
        at::Tensor& sum = (*sums[k])[i];
        const at::ScalarType type = wide_type(parameters[i].scalar_type());
        if (taking_part_[k][i]) {
          sum = !sum.defined()
                    ? at::zeros_like(parameters[i].detach(), parameters[i].options().dtype(type).requires_grad(false))
                    : sum.to(type);
          tensors.push_back(&sum);
        }
      }
    }
    add_up(tensors);
  }

  /// Buffers as they are to become, where `moved`; undefined otherwise.
  std::vector<at::Tensor> merged(const std::vector<at::Tensor>& buffers, const Snapshot& snapshot,
                                 const std::vector<bool>& moved, RankBuffers how) {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> result(buffers.size());
    if (alone()) {
      return result;
    }
    const auto samples_of = [&](std::size_t r) { return entered_[r][static_cast<std::size_t>(Entry::samples)]; };
    std::size_t first = 0;
    while (!(samples_of(first) > 0)) {
      ++first;
    }
    const double share = samples_of(rank_) / static_cast<double>(samples_);
    std::vector<at::Tensor*> tensors;
    std::vector<std::size_t> averaged;
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      if (!moved[i]) {
        continue;
      }
      const bool number = buffers[i].is_floating_point() || buffers[i].is_complex();
      const at::ScalarType type = number ? wide_type(buffers[i].scalar_type()) : at::kLong;
      const at::Tensor now = without_repetitions(buffers[i].detach()).to(type);
      if (number && how == RankBuffers::averaged) {
        // By how far they have moved, so that what has not moved stays as it is.
        averaged.push_back(i);
        result[i] = share > 0 ? (now - snapshot.find(buffers[i])->before()) * share : at::zeros_like(now);
      } else {
        result[i] = rank_ == first ? now.clone() : at::zeros_like(now);
      }
      tensors.push_back(&result[i]);
    }
    add_up(tensors);
    for (const std::size_t i : averaged) {
      result[i] += snapshot.find(buffers[i])->before();
    }
    return result;
  }

  /// To be called before commit() where something may still be found wrong, which is then told to the others. Throws
  /// where sums are not those of all ranks.
  void check() {
    phase_ = alone() ? phase_ : Phase::committing;
    for (const at::Tensor& ones : ones_) {
      if (ones.item<double>() != static_cast<double>(size_)) {
        throw_not_added();
      }
    }
  }

  /// Whether the step is to be skipped, when everything has arrived everywhere. Throws on all ranks otherwise.
  bool commit(Fared fared) {
    if (alone()) {
      return fared == Fared::to_be_skipped;
    }
    Words own(head);
    own.front() = static_cast<double>(fared);
    gather(own, {});
    return settle(Phase::away);
  }

  /// Tells the others of the error that is being handled, if they do not know yet. Whether all that went wrong on any
  /// rank is a number that is not finite.
  bool leave(const std::exception& error, bool not_finite) noexcept {
    if (alone() || phase_ == Phase::away) {
      return not_finite;
    }
    const Phase phase = std::exchange(phase_, Phase::away);
    const Fared fared = not_finite ? Fared::not_finite : Fared::failed;
    if (const auto* const found = dynamic_cast<const NonFiniteError*>(&error)) {
      micro_batch_ = found->micro_batch();
    }
    try {
      message_ = error.what();
      message_ = message_.substr(0, message_.find('\n'));
      if (phase == Phase::reducing) {  // in the midst of collectives, of which the others wait for some
        communicator_->abandon(text({message_, " (", where(), ")"}));
        return false;
      }
      const std::size_t words = phase == Phase::entering    ? static_cast<std::size_t>(Entry::words)
                                : phase == Phase::computing ? static_cast<std::size_t>(Passed::words)
                                                            : head;
      Words own(words);
      own.front() = static_cast<double>(fared);
      gather(own, phase == Phase::computing ? no_flags(lists_) : Words());
      settle(Phase::away);
    } catch (const NonFiniteError&) {
      return not_finite;
    } catch (const std::exception&) {
      return false;  // another rank's, or no connection: the error that is on its way says more
    }
    return false;
  }

  /// For the retry of a step that was not finite on some rank.
  void begin_again() noexcept { *this = Ranks(communicator_, step_); }

  /// How many lists of sums a step has, for a rank that fails before there are any.
  void expect_lists(std::size_t count) noexcept {
    lists_ = count;
    call_ = count > 0 ? Call::backward : Call::measure;
  }

 private:
  using Words = std::vector<double>;
  using Table = std::vector<Words>;
  /// Until when `leave` has something to say, and in which exchange.
  enum class Phase { entering, computing, reducing, committing, away };

  /// Each exchange begins with how a rank fared, in which micro-batch, and a 1.
  static constexpr std::size_t head = 3;
  static constexpr std::size_t watched_generators = 4;
  static constexpr std::size_t compared_settings = 21;
  static constexpr std::size_t bucket_bytes = std::size_t{25} << 20;

  enum class Entry : std::size_t {
    call = head,
    micro_batches,
    samples,
    step,
    shapes,
    first,
    sum,
    magnitude,
    settings,
    states = settings + compared_settings,
    generators = states + watched_generators,
    words = generators + watched_generators
  };
  enum class Passed : std::size_t {
    factor = head,
    counts,
    counted,
    uncounted,
    overflowed,
    drew,
    words = drew + watched_generators
  };

  enum class Call { backward, measure, reduced };
  static std::string_view name_of(double call) {
    return call == 0 ? "backward()" : call == 1 ? "measure()" : "reduced()";
  }
  /// What the ranks are in, in words.
  [[nodiscard]] std::string where() const {
    return call_ == Call::backward ? text({"step ", step_}) : std::string(name_of(static_cast<double>(call_)));
  }

  /// A number that a double holds exactly.
  static double as_word(std::uint64_t hash) { return static_cast<double>(hash >> 12); }

  /// Of a generator among those of all processes.
  static double identity_of(const void* generator) {
    static const std::uint64_t process = [] {
      std::random_device device;
      return (std::uint64_t{device()} << 32) ^ device();
    }();
    Hash hash;
    hash.add(process);
    hash.add(reinterpret_cast<std::uintptr_t>(generator));
    return as_word(hash.value());
  }

  /// All parameters and buffers, which have to be the same on all ranks.
  static std::vector<at::Tensor> state_of(const Task& task) {
    std::vector<at::Tensor> result;
    for (const NamedParameter& parameter : task.all_parameters) {
      if (parameter.tensor.defined()) {
        result.push_back(parameter.tensor);
      }
    }
    result.insert(result.end(), task.buffers.begin(), task.buffers.end());
    return result;
  }

  static double shapes_of(const Task& task) {
    Hash hash;
    hash.add(task.parameters.names.size());
    for (const std::string& name : task.parameters.names) {
      hash.add(name);
    }
    hash.add(task.buffers.size());
    for (const at::Tensor& tensor : state_of(task)) {
      hash.add(tensor.scalar_type());
      hash.add(tensor.dim());
      for (const std::int64_t size : tensor.sizes()) {
        hash.add(size);
      }
    }
    return as_word(hash.value());
  }

  /// What has to be the same on all ranks, in words for who reads of a difference.
  struct Setting {
    std::string_view name;
    double value;
    bool is_number = false;  ///< otherwise a hash, or the number of a name
  };
  [[nodiscard]] std::vector<Setting> settings_of(const Task& task) const {
    const RegularizerOptions& options = task.options;
    const auto hash_of = [](const auto&... values) {
      Hash hash;
      (hash.add(values), ...);
      return as_word(hash.value());
    };
    const auto number = [](auto value) { return static_cast<double>(value); };
    Hash penalties, strengths, selected;
    for (std::size_t i = 0; i < task.batch.terms(); ++i) {
      penalties.add(task.batch.term(i).name);
      strengths.add(task.strengths[i]);
    }
    for (const std::size_t i : task.parameters.selected) {
      selected.add(i);
    }
    const auto& dynamic = options.loss_scale.dynamic;
    std::vector<Setting> result{
        {"micro_batch_size", number(options.micro_batch_size), true},
        {"penalties", as_word(penalties.value())},
        {"strength", task.strengths.empty() ? 0 : task.strengths.front(), true},
        {"strengths", as_word(strengths.value())},
        {"parameters in select", as_word(selected.value())},
        {"estimator", number(options.estimator.index())},
        {"estimator",
         std::visit(
             [&](const auto& kind) {
               if constexpr (requires { kind.check_every; }) {
                 return hash_of(kind.step, kind.gates, kind.check_every, kind.tolerance, kind.own_functions);
               } else {
                 return 0.0;
               }
             },
             static_cast<const std::variant<Exact, ForwardDifference, CentralDifference>&>(options.estimator))},
        {"sampling.share", options.sampling.share, true},
        {"sampling.every", number(options.sampling.every), true},
        {"sampling.seed", hash_of(options.sampling.seed)},
        {"weighting", number(options.weighting)},
        {"reduction", number(options.reduction)},
        {"short_last", number(options.short_last)},
        {"non_finite", number(options.non_finite)},
        {"check_finite", number(options.check_finite)},
        {"autocast", options.autocast.has_value() ? number(*options.autocast) : -1},
        {"loss_scale", options.loss_scale.number, true},
        {"loss_scale", dynamic ? hash_of(dynamic->growth, dynamic->backoff, dynamic->interval) : 0},
        {"gradient_ratio", number(options.gradient_ratio)},
        {"rank_buffers", number(options.rank_buffers)},
        {"advance", number(options.advance)}};
    TORCH_INTERNAL_ASSERT(result.size() == compared_settings);
    return result;
  }

  /// The sum of a few values of each parameter and buffer, and that of their magnitudes. Waits for a device.
  static std::pair<double, double> checksum(const Task& task) {
    const at::NoGradGuard no_grad;
    double sum = 0, magnitude = 0;
    const auto add = [&](const auto* data, std::int64_t count, std::int64_t stride) {
      for (std::int64_t i = 0; i < count; i += stride) {
        sum += static_cast<double>(data[i]);
        magnitude += std::abs(static_cast<double>(data[i]));
      }
    };
    std::vector<std::vector<at::Tensor>> elsewhere;  // by device and type, to be looked at together
    for (const at::Tensor& tensor : state_of(task)) {
      const auto types = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
      if (tensor.is_meta() || std::find(types.begin(), types.end(), tensor.scalar_type()) == types.end() ||
          tensor.layout() != at::kStrided || !tensor.is_non_overlapping_and_dense()) {
        continue;
      }
      const std::int64_t count = tensor.numel(), stride = std::max<std::int64_t>(1, count / 16);
      if (!tensor.is_cpu()) {
        const auto like = std::find_if(elsewhere.begin(), elsewhere.end(), [&](const auto& group) {
          return group.front().device() == tensor.device() && group.front().scalar_type() == tensor.scalar_type();
        });
        auto& group = like == elsewhere.end() ? elsewhere.emplace_back() : *like;
        group.push_back(tensor.detach().as_strided({(count + stride - 1) / stride}, {stride}));
      } else if (tensor.scalar_type() == at::kFloat) {
        add(values_of<float>(tensor), count, stride);
      } else if (tensor.scalar_type() == at::kDouble) {
        add(values_of<double>(tensor), count, stride);
      } else if (tensor.scalar_type() == at::kBFloat16) {
        add(values_of<at::BFloat16>(tensor), count, stride);
      } else {
        add(values_of<at::Half>(tensor), count, stride);
      }
    }
    for (const std::vector<at::Tensor>& group : elsewhere) {
      const at::Tensor values = at::cat(group).to(at::kCPU, at::kDouble);
      add(values_of<double>(values), values.numel(), 1);
    }
    return {sum, magnitude};
  }

  /// The first exchange of whatever the ranks do together. Throws on all of them unless they do the same.
  void meet(Words own, Call call) {
    constexpr auto word = static_cast<std::size_t>(Entry::call);
    call_ = call;
    own[word] = static_cast<double>(call);
    entered_ = gather(own, {});
    settle(Phase::away);  // what is thrown here, and behind it, is thrown by all
    for (std::size_t r = 1; r < size_; ++r) {
      if (entered_[r][word] != entered_[0][word]) {
        throw OptionError(text({"rank ", r, " calls ", name_of(entered_[r][word]), " where rank 0 calls ",
                                name_of(entered_[0][word]), "; call each of them on every rank, in the same order"}));
      }
    }
  }

  template <class Of>
  void require_same_task(std::size_t r, const Of& of, const std::vector<Setting>& settings) const {
    if (of(r, Entry::step) != of(0, Entry::step)) {
      throw OptionError(
          text({"rank ", r, " takes step ", of(r, Entry::step), " where rank 0 takes step ", of(0, Entry::step),
                "; call backward() as often on every rank, with an empty batch where "
                "there are no samples, and set_step() alike"}));
    }
    if (of(r, Entry::shapes) != of(0, Entry::shapes)) {
      throw ModelError(
          text({"rank ", r, " has parameters or buffers of other number, name, shape or type than rank 0 in ", where(),
                "; make the same model on every rank, with the same parameters frozen"}));
    }
    for (std::size_t i = 0; i < settings.size(); ++i) {
      const auto value = [&](std::size_t rank) {
        return entered_[rank][static_cast<std::size_t>(Entry::settings) + i];
      };
      if (value(r) != value(0)) {
        const std::string numbers =
            settings[i].is_number ? text({": ", value(r), " where rank 0 has ", value(0)}) : std::string();
        throw OptionError(text({"rank ", r, " is not about the same as rank 0 in ", where(), ", but has other ",
                                settings[i].name, numbers, "; make the same Regularizer on every rank"}));
      }
    }
  }

  template <class Of>
  void require_same_values(std::size_t r, const Of& of) const {
    const double apart = std::abs(of(r, Entry::sum) - of(0, Entry::sum));
    if (apart > 1e-6 * of(0, Entry::magnitude)) {
      throw ModelError(text({"the parameters or buffers of rank ", r, " are no longer those of rank 0 in ", where(),
                             ": one rank has changed them alone, by grafting with a norm of its own instead of the "
                             "reduced() report's, an optimizer with other options, a checkpoint or a forward pass "
                             "in training mode; do it on all ranks alike"}));
    }
  }

  void require_independent_draws(const Table& passed) const {
    for (std::size_t a = 0; a < size_; ++a) {
      for (std::size_t b = a + 1; b < size_; ++b) {
        for (std::size_t i = 0; i < watched_generators; ++i) {
          const auto drew = [&](std::size_t r) { return passed[r][static_cast<std::size_t>(Passed::drew) + i] > 0; };
          const auto same = [&](Entry entry) {
            const std::size_t word = static_cast<std::size_t>(entry) + i;
            return entered_[a][word] == entered_[b][word];
          };
          if (drew(a) && drew(b) && same(Entry::states) && !same(Entry::generators)) {
            throw OptionError(text({"ranks ", a, " and ", b, " draw the same random numbers in ", where(),
                                    " (labels, directions, dropout), which are not independent then; call "
                                    "manual_seed(seed, communicator) of microreg/distributed once on every rank, or "
                                    "seed the generators by rank"}));
          }
        }
      }
    }
  }

  [[nodiscard]] Words no_flags(std::size_t lists) const { return Words(lists * parameters_ + buffers_); }

  /// Calls what waits for others; its RankError says in which step. After an error of another kind the others still
  /// wait for this rank.
  template <class Call>
  auto together(const Call& call) {
    const Phase before = std::exchange(phase_, Phase::reducing);
    try {
      if constexpr (std::is_void_v<decltype(call())>) {
        call();
        phase_ = before;
      } else {
        auto result = call();
        phase_ = before;
        return result;
      }
    } catch (const RankError& error) {
      phase_ = Phase::away;
      throw RankError(text({error.what(), ", in ", where(), "; nothing has changed here"}), error.ranks());
    }
  }

  /// What every rank has in `own`; the sums over all ranks of `shared` come into shared_.
  Table gather(const Words& own, const Words& shared) {
    phase_ = Phase::reducing;
    const at::NoGradGuard no_grad;
    at::Tensor all = at::zeros({static_cast<std::int64_t>(size_ * own.size() + shared.size())},
                               at::device(at::kCPU).dtype(at::kDouble));
    double* const data = all.mutable_data_ptr<double>();
    std::copy(own.begin(), own.end(), data + rank_ * own.size());
    data[rank_ * own.size() + 1] = static_cast<double>(micro_batch_);
    data[rank_ * own.size() + 2] = 1;
    std::copy(shared.begin(), shared.end(), data + size_ * own.size());
    together([&] { communicator_->all_reduce(all)(); });
    Table table;
    fared_.clear();
    micro_batches_of_ranks_.clear();
    for (std::size_t r = 0; r < size_; ++r) {
      table.emplace_back(data + r * own.size(), data + (r + 1) * own.size());
      if (table.back()[2] != 1) {
        throw_not_added();
      }
      fared_.push_back(static_cast<Fared>(static_cast<int>(table.back().front())));
      micro_batches_of_ranks_.push_back(static_cast<std::int64_t>(table.back()[1]));
    }
    shared_.assign(data + size_ * own.size(), data + all.numel());
    phase_ = Phase::away;
    return table;
  }

  [[noreturn]] void throw_not_added() const {
    throw RankError(text({"all_reduce() of the communicator has not added up what ", size_, " ranks handed in, in ",
                          where(), "; it has to add up, wait in what it returns, and throw where it fails"}),
                    {});
  }

  /// Throws on all ranks what the last exchange says went wrong on one of them; otherwise whether the step is skipped.
  bool settle(Phase next) {
    const auto first = [&](Fared fared) {
      return static_cast<std::size_t>(std::find(fared_.begin(), fared_.end(), fared) - fared_.begin());
    };
    const std::size_t failed = first(Fared::failed);
    const std::size_t not_finite = first(Fared::not_finite);
    if (failed < size_) {
      throw RankError(text({"rank ", failed, " has failed in ", where(), ": ", message_of(failed),
                            "; nothing has changed on any rank"}),
                      {static_cast<std::int64_t>(failed)});
    }
    if (not_finite < size_) {
      throw NonFiniteError(text({"on rank ", not_finite, ": ", message_of(not_finite)}),
                           micro_batches_of_ranks_[not_finite]);
    }
    phase_ = next;
    return first(Fared::to_be_skipped) < size_;
  }

  /// What rank `r` said, on all ranks.
  std::string message_of(std::size_t r) {
    at::Tensor bytes = at::zeros({1024}, at::device(at::kCPU).dtype(at::kByte));
    char* const data = reinterpret_cast<char*>(bytes.mutable_data_ptr<std::uint8_t>());
    if (r == rank_) {
      std::memcpy(data, message_.data(), std::min<std::size_t>(message_.size(), 1023));
    }
    together([&] { communicator_->broadcast(bytes, static_cast<std::int64_t>(r)); });
    return data;
  }

  void make_equal(const Task& task) {
    const at::NoGradGuard no_grad;
    for (const at::Tensor& tensor : state_of(task)) {
      if (tensor.layout() != at::kStrided || tensor.numel() == 0) {
        continue;
      }
      const at::Tensor plain = without_repetitions(tensor.detach());
      const at::Tensor flat = plain.contiguous().view(-1);
      // As bytes: an engine need not know the type.
      together([&] { communicator_->broadcast(flat.view(at::kByte), 0); });
      if (!flat.is_alias_of(plain)) {
        plain.copy_(flat.view(plain.sizes()));
      }
    }
  }

  /// Adds up in buckets, the last tensor first, while the next one is packed. Each ends with a 1, for check().
  void add_up(const std::vector<at::Tensor*>& tensors) {
    const at::NoGradGuard no_grad;
    struct Bucket {
      at::Tensor flat;
      std::function<void()> wait;
      std::size_t begin, end;
    };
    std::deque<Bucket> under_way;
    const auto unpack = [&] {
      const Bucket& bucket = under_way.front();
      together(bucket.wait);
      std::int64_t offset = 0;
      for (std::size_t i = bucket.begin; i < bucket.end; ++i) {
        at::Tensor& tensor = *tensors[i];
        const at::Tensor real = tensor.is_complex() ? at::view_as_real(tensor) : tensor;
        real.copy_(bucket.flat.narrow(0, offset, real.numel()).view(real.sizes()));
        offset += real.numel();
      }
      ones_.push_back(bucket.flat.narrow(0, offset, 1).clone());
      under_way.pop_front();
    };
    for (std::size_t end = tensors.size(); end > 0;) {
      std::size_t begin = end, bytes = 0;
      std::vector<at::Tensor> packed;
      const auto fits = [&](const at::Tensor& tensor) {
        const at::Tensor& last = *tensors[end - 1];
        return begin == end || (tensor.scalar_type() == last.scalar_type() && tensor.device() == last.device() &&
                                bytes + tensor.nbytes() <= bucket_bytes);
      };
      while (begin > 0 && fits(*tensors[begin - 1])) {
        const at::Tensor& tensor = *tensors[--begin];
        bytes += tensor.nbytes();
        packed.push_back((tensor.is_complex() ? at::view_as_real(tensor) : tensor).reshape({-1}));
      }
      std::reverse(packed.begin(), packed.end());
      packed.push_back(at::ones({1}, packed.front().options()));
      at::Tensor flat = at::cat(packed);
      auto wait = together([&] { return communicator_->all_reduce(flat); });
      under_way.push_back({std::move(flat), std::move(wait), begin, end});
      if (under_way.size() > 1) {
        unpack();
      }
      end = begin;
    }
    while (!under_way.empty()) {
      unpack();
    }
  }

  Communicator* communicator_;
  std::int64_t step_;
  Call call_ = Call::backward;
  std::size_t size_ = 1;
  std::size_t rank_ = 0;
  Phase phase_ = Phase::entering;
  std::size_t parameters_ = 0;
  std::size_t buffers_ = 0;
  std::size_t lists_ = 1;
  std::int64_t micro_batches_ = 0;
  std::int64_t samples_ = 0;
  double counts_ = 0;
  std::optional<GeneratorStates> generators_;
  Table entered_;
  std::vector<Fared> fared_;
  std::vector<std::int64_t> micro_batches_of_ranks_;  ///< in which each has met NaN or infinity
  std::int64_t micro_batch_ = 0;                      ///< the same of this rank
  Words shared_;
  std::vector<std::vector<bool>> taking_part_;
  std::vector<at::Tensor> ones_;  ///< added up with each bucket
  std::string message_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
