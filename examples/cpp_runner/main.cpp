// Samples an "aoti" export of stepgraph without Python.
//
//   sample EXPORT conditioning.safetensors latents.safetensors [--guidance 4] [--picture images.ppm] [--no-verify]
//
// conditioning.safetensors holds the noise [B, C, ...] as `noise` and the model's inputs behind latents and timestep, batch
// first, by their names; with guidance the unconditional ones as negative_<name>. The picture is for models whose latents are
// pixels. The weights are compared with their hash in the schedule, and others refused; --no-verify saves reading them all.

#include <c10/core/InferenceMode.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

#include "runner.h"

namespace {

constexpr const char* kUsage =
    "usage: sample EXPORT conditioning.safetensors latents.safetensors [--guidance 4] [--picture images.ppm] [--no-verify]";

struct Arguments {
  std::string folder, conditioning, latents, picture;
  double guidance = 1;
  bool verify = true;
};

double number(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') throw std::runtime_error("--guidance is " + text + "; expected a number");
  return value;
}

Arguments parse(int argc, char** argv) {
  if (argc < 4) throw std::runtime_error(kUsage);
  Arguments made{argv[1], argv[2], argv[3], ""};
  for (int i = 4; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--no-verify") {
      made.verify = false;
      continue;
    }
    if (name != "--guidance" && name != "--picture") throw std::runtime_error("unknown option " + name + "\n" + kUsage);
    if (++i == argc) throw std::runtime_error(kUsage);
    if (name == "--guidance") made.guidance = number(argv[i]);
    else made.picture = argv[i];
  }
  return made;
}

void run(const Arguments& arguments) {
  const c10::InferenceMode inference;
  Runner runner(arguments.folder, arguments.verify);
  Tensors given;
  for (const auto& [name, tensor] : read_tensors(arguments.conditioning)) given[name] = tensor.to(runner.device());
  if (!given.count("noise")) throw std::runtime_error(arguments.conditioning + " has no noise");
  const at::Tensor latents = runner.sample(given.at("noise"), arguments.guidance, given);
  write_tensor(arguments.latents, "latents", latents);
  if (!arguments.picture.empty()) write_ppm(arguments.picture, latents);
  std::cout << "wrote " << arguments.latents << ": " << latents.sizes() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
