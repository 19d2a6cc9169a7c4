// Runs an "aoti" export of stepgraph: the schedule table, the weights once, and the compiled programs.
//
// The same walk through the schedule as the export's run.py; docs/export.md of stepgraph describes the table.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "json.h"
#include "sha256.h"
#include "tensors.h"

using Values = std::vector<at::Tensor>;

inline void append(Values& values, const Values& more) { values.insert(values.end(), more.begin(), more.end()); }

class Runner {
 public:
  // Compares the weights with their hash, which reads all of them, unless `verify` is false; programs always are.
  explicit Runner(const std::string& folder, bool verify = true)
      : schedule(Json::parse(read_text(folder + "/schedule.json"))), folder_(folder) {
    const std::string format = schedule["format"].string();
    const int64_t version = schedule["version"].integer();
    if (format != "stepgraph-aoti" || version != 1)
      throw std::runtime_error(folder + " is of the format " + format + ", version " + std::to_string(version) +
                               "; this runner reads version 1 of stepgraph-aoti");
    if (verify) refuse_damaged(schedule["weights"].string());
    const at::Device device = this->device();
    for (const auto& [name, tensor] : read_tensors(folder + "/" + schedule["weights"].string()))
      weights_[name] = tensor.to(device);
  }

  at::Device device() const { return at::Device(schedule["device"].string()); }

  const at::Tensor& weight(const std::string& name) const { return weights_.at(name); }

  bool has(const std::string& name) const { return schedule["programs"].has(name); }

  // Runs a program on its inputs; strides are part of what was compiled, so every one is made contiguous.
  Values call(const std::string& name, const Values& inputs) {
    const Json& program = schedule["programs"][name];
    Values given;
    for (const at::Tensor& tensor : inputs) given.push_back(tensor.contiguous());
    for (const Json& key : program["weights"].array()) given.push_back(weight(key.string()));
    auto& loader = programs_[name];
    if (!loader) {
      refuse_damaged(program["file"].string());
      loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
          folder_ + "/" + program["file"].string(), "model", false, 1, device().index());
    }
    return loader->run(given);
  }

  at::Tensor sample(const at::Tensor& noise, double guidance, const Tensors& given);

  const Json schedule;

 private:
  void refuse_damaged(const std::string& file) const {
    if (!schedule.has("sha256") || !schedule["sha256"].has(file))
      throw std::runtime_error("schedule.json has no SHA-256 of " + file + "; export again");
    const std::string wanted = schedule["sha256"][file].string(), actual = sha256_of(folder_ + "/" + file);
    if (actual != wanted)
      throw std::runtime_error(folder_ + "/" + file + " is not what was exported: its SHA-256 is " + actual + ", expected " +
                               wanted + "; copy it again");
  }

  std::string folder_;
  Tensors weights_;
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> programs_;
};

// One run of a schedule: which step is next, and what is stored. Called once per step and branch.
class Session {
 public:
  explicit Session(Runner& runner)
      : runner_(runner),
        slots_(runner.schedule["branches"].array().size()),
        tables_(runner.schedule["branches"].array().size()) {}

  // The model's first output at the next step, or for its next branch; conditioning without latents and timestep.
  at::Tensor operator()(const at::Tensor& latents, double timestep, const Tensors& conditioning) {
    const Json& schedule = runner_.schedule;
    const Json& step = schedule["steps"][step_];
    const Json& variant = schedule["variants"][static_cast<size_t>(step["variant"].integer())];
    auto& slots = slots_[branch_];
    const Tensors named = inputs(latents, timestep, conditioning);
    Values given;
    for (const Json& entry : schedule["inputs"].array()) given.push_back(named.at(entry["name"].string()));
    for (int64_t slot : step["reads"].integers()) append(given, slots.at(slot));
    for (const Json& name : step["constants"][branch_].array()) given.push_back(runner_.weight(name.string()));
    const auto taken = variant["tables"].integers();
    if (!taken.empty()) {
      const Values known = tables(named);
      for (int64_t number : taken) given.push_back(known.at(static_cast<size_t>(number)));
    }
    const Values outputs = runner_.call(variant["program"].string(), given);
    store(outputs, step, variant, slots);
    branch_ = (branch_ + 1) % slots_.size();
    step_ += branch_ == 0;
    return outputs.front();
  }

 private:
  struct Tables {
    Values prompt, batched;
  };

  void store(const Values& outputs, const Json& step, const Json& variant, std::map<int64_t, Values>& slots) const {
    auto next = outputs.begin() + runner_.schedule["results"].integer();
    const auto places = step["stores"].integers(), counts = variant["stores"].integers();
    for (size_t i = 0; i < places.size(); ++i) {
      slots[places[i]] = Values(next, next + counts[i]);
      next += counts[i];
    }
    for (int64_t slot : step["frees"].integers()) slots.erase(slot);
  }

  Tensors inputs(const at::Tensor& latents, double timestep, const Tensors& conditioning) const {
    Tensors made;
    bool first = true;
    for (const Json& entry : runner_.schedule["inputs"].array()) {
      const std::string& name = entry["name"].string();
      const auto shape = entry["shape"].integers();
      const auto options = latents.options().dtype(dtype(entry["dtype"].string()));
      if (name == "timestep") {
        made[name] = at::full(shape, timestep, options);
      } else {
        const at::Tensor& value = first ? latents : conditioning.at(name);
        if (value.sizes() != at::IntArrayRef(shape))
          throw std::runtime_error(name + " has the shape " + text(value.sizes()) + "; exported for " + text(shape));
        const at::ScalarType wanted = dtype(entry["dtype"].string());
        if (!c10::canCast(value.scalar_type(), wanted))
          throw std::runtime_error(name + " is of " + c10::toString(value.scalar_type()) + "; exported for " +
                                   c10::toString(wanted));
        made[name] = value.to(options);
      }
      first = false;
    }
    return made;
  }

  static std::string text(at::IntArrayRef shape) {
    std::ostringstream made;
    made << shape;
    return made.str();
  }

  static at::ScalarType dtype(const std::string& name) {
    static const std::map<std::string, at::ScalarType> known = {
        {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
        {"int64", at::kLong},     {"int32", at::kInt},     {"bool", at::kBool}};
    const auto found = known.find(name);
    if (found == known.end()) throw std::runtime_error("an input has the dtype " + name + ", which is not known here");
    return found->second;
  }

  // What depends on prompt and timestep alone: computed at a run's first step, for all steps where that is possible.
  Values tables(const Tensors& named) {
    Values fixed;
    for (const Json& name : runner_.schedule["tables"]["inputs"].array()) fixed.push_back(named.at(name.string()));
    auto& known = tables_[branch_];
    if (!known) known = first_tables(named.at("timestep"), fixed);
    Values made = known->prompt;
    if (!known->batched.empty()) {
      for (const at::Tensor& table : known->batched) made.push_back(table[static_cast<int64_t>(step_)]);
    } else if (runner_.has("timestep")) {
      append(made, runner_.call("timestep", with_timestep(named.at("timestep"), fixed, known->prompt)));
    }
    return made;
  }

  Tables first_tables(const at::Tensor& timestep, const Values& fixed) {
    Tables made;
    if (runner_.has("prompt")) made.prompt = runner_.call("prompt", fixed);
    if (!runner_.schedule["tables"]["batched"].boolean()) return made;
    std::vector<double> numbers;
    for (const Json& step : runner_.schedule["steps"].array()) numbers.push_back(step["model_timestep"].number());
    std::vector<int64_t> column(static_cast<size_t>(timestep.dim()) + 1, 1), whole = timestep.sizes().vec();
    column.front() = static_cast<int64_t>(numbers.size());
    whole.insert(whole.begin(), column.front());
    const at::Tensor every = at::tensor(numbers).to(timestep.options()).view(column).expand(whole);
    made.batched = runner_.call("timestep", with_timestep(every, fixed, made.prompt));
    return made;
  }

  static Values with_timestep(const at::Tensor& timestep, const Values& fixed, const Values& prompt) {
    Values given = {timestep};
    append(given, fixed);
    append(given, prompt);
    return given;
  }

  Runner& runner_;
  size_t step_ = 0, branch_ = 0;
  std::vector<std::map<int64_t, Values>> slots_;
  std::vector<std::optional<Tables>> tables_;
};

// A step of the sampler: a fixed linear combination of latents and predictions, [0] of this step, [1] of the one before.
inline at::Tensor combined(const std::deque<Values>& kept, const Json& terms, at::ScalarType dtype) {
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  Values parts;
  for (const Json& term : terms.array()) {
    const at::Tensor& value = kept.at(static_cast<size_t>(term[0].integer())).at(static_cast<size_t>(term[1].integer()));
    parts.push_back(value.to(wide) * term[2].number());
  }
  return at::stack(parts).sum(0).to(dtype);
}

// Denoises: noise [B, C, ...]; guidance above 1 is classifier-free, with the unconditional inputs as negative_<name>.
inline at::Tensor Runner::sample(const at::Tensor& noise, double guidance, const Tensors& given) {
  const Json& sampler = schedule["sampler"];
  if (!sampler.has("terms")) throw std::runtime_error("the schedule has no sampler: " + sampler["reason"].string());
  const bool guided = guidance > 1, separate = schedule["guidance"].string() == "separate";
  if (separate && !guided) throw std::runtime_error("the plan has a branch each for cond and uncond; pass a guidance above 1");
  Tensors cond, uncond, both;
  for (size_t i = 1; i < schedule["inputs"].array().size(); ++i) {
    const std::string& name = schedule["inputs"][i]["name"].string();
    if (name == "timestep") continue;
    for (const std::string& wanted : {name, "negative_" + name})
      if ((guided || wanted == name) && !given.count(wanted))
        throw std::runtime_error("the conditioning has no " + wanted);
    cond[name] = given.at(name);
    if (guided) uncond[name] = given.at("negative_" + name);
    if (guided && !separate) both[name] = at::cat({cond[name], uncond[name]});
  }
  Session session(*this);
  const int64_t channels = noise.size(1);
  at::Tensor latents = noise * sampler["init_noise_sigma"].number();
  std::deque<Values> kept;
  size_t oldest = 0;
  for (const Json& terms : sampler["terms"].array())
    for (const Json& term : terms.array()) oldest = std::max(oldest, static_cast<size_t>(term[0].integer()));
  for (size_t step = 0; step < schedule["steps"].array().size(); ++step) {
    const double timestep = schedule["steps"][step]["model_timestep"].number(), scale = sampler["scales"][step].number();
    const at::Tensor scaled = scale != 1 ? latents * scale : latents;
    Values outputs;
    if (!guided) outputs = {session(scaled, timestep, cond)};
    else if (separate) outputs = {session(scaled, timestep, cond), session(scaled, timestep, uncond)};
    else outputs = session(at::cat({scaled, scaled}), timestep, both).chunk(2);
    // A variance that the model predicts in as many channels again is left out.
    for (at::Tensor& output : outputs) output = output.slice(1, 0, channels);
    const at::Tensor& base = outputs.back();
    kept.push_front({latents, guided ? base + guidance * (outputs.front() - base) : base});
    latents = combined(kept, sampler["terms"][step], latents.scalar_type());
    if (kept.size() > oldest) kept.pop_back();
  }
  return latents;
}
