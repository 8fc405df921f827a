/// @file
/// Loads two shared objects that both include the headers, and opens scopes of both in one process: nested, interleaved
/// and from two threads at once. With --versions: two that include different versions, of which the first to open a
/// scope has it, and the second is refused. The test fails, too, if anything is printed that looks like a warning.
#include "object.hpp"

#include <dlfcn.h>

#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>

namespace {

struct Object {
  void* handle;
  decltype(&::open_scope) open_scope;
  decltype(&::close_scope) close_scope;
  decltype(&::step) step;
  decltype(&::is_fused) is_fused;
  decltype(&::refusal) refusal;
  decltype(&::gates_seen) gates_seen;
  decltype(&::gates_seen_in_step) gates_seen_in_step;

  explicit Object(const char* path, int visible = RTLD_LOCAL) : handle(dlopen(path, RTLD_NOW | visible)) {
    if (handle == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::exit(1);
    }
    find(open_scope, "open_scope");
    find(close_scope, "close_scope");
    find(step, "step");
    find(is_fused, "is_fused");
    find(refusal, "refusal");
    find(gates_seen, "gates_seen");
    find(gates_seen_in_step, "gates_seen_in_step");
  }

 private:
  template <class Pointer>
  void find(Pointer& pointer, const char* name) {
    pointer = reinterpret_cast<Pointer>(dlsym(handle, name));
  }
};

int failures = 0;

void check(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "not so: %s\n", what);
    ++failures;
  }
}

int check_versions(const char* first_path, const char* second_path) {
  // Global, so that what the two have in common by name would be one.
  const Object first(first_path, RTLD_GLOBAL);
  const Object second(second_path, RTLD_GLOBAL);
  const double stock = first.step();
  check(std::string(first.refusal()).empty() && first.gates_seen() == 1, "the first version has its kernels");
  const std::string refusal = second.refusal();
  std::printf("%s\n", refusal.c_str());
  check(refusal.find("another version of microreg (0.") == 0, "the second is refused by a message that says why");
  check(second.gates_seen() == -1, "the second is refused a session");
  check(!second.is_fused() && second.step() == stock, "the second without a scope: LibTorch as it is");
  check(first.gates_seen() == 1, "the first has its kernels still");
  void* scope = first.open_scope();
  check(first.is_fused() && std::abs(first.step() - stock) < 1e-9 * stock, "the first is fused, and right");
  first.close_scope(scope);
  return failures;
}

}  // namespace

int main(int, char** arguments) {
  if (std::strcmp(arguments[1], "--versions") == 0) {
    return check_versions(arguments[2], arguments[3]);
  }
  const Object a(arguments[1]);
  const Object b(arguments[2]);
  check(a.open_scope != b.open_scope, "the objects are two");
  const double stock = a.step();
  const auto right = [&](double result) { return std::abs(result - stock) < 1e-9 * stock; };

  // Both first scopes at the same time: the kernels are registered once all the same.
  std::barrier start(2);
  bool threads_right[2] = {false, false};
  const auto work = [&](const Object& object, bool& all_right) {
    start.arrive_and_wait();
    all_right = true;
    for (int i = 0; i < 20; ++i) {
      void* scope = object.open_scope();
      all_right = all_right && object.is_fused() && right(object.step());
      object.close_scope(scope);
      all_right = all_right && !object.is_fused();
    }
  };
  std::thread first(work, std::cref(a), std::ref(threads_right[0]));
  std::thread second(work, std::cref(b), std::ref(threads_right[1]));
  first.join();
  second.join();
  check(threads_right[0] && threads_right[1], "two threads, a scope each: fused, right, and over at its end");
  check(b.gates_seen() == 1 && a.gates_seen() == 1, "sessions of both, whichever registered the kernels");

  for (const Object* object : {&a, &b}) {
    const int seen = object->gates_seen_in_step(0);
    check(seen >= 2 && object->gates_seen_in_step(2) == seen, "a step with workers: no gate escapes the session");
  }

  void* outer = a.open_scope();
  void* inner = b.open_scope();
  check(a.is_fused() && b.is_fused(), "nested: fused for both");
  check(right(a.step()) && right(b.step()), "nested: right for both");
  b.close_scope(inner);
  check(a.is_fused() && right(a.step()), "the inner one ended: the outer one goes on");
  a.close_scope(outer);
  check(!a.is_fused() && !b.is_fused(), "both ended: LibTorch as it was");

  outer = a.open_scope();
  inner = b.open_scope();
  a.close_scope(outer);
  check(right(a.step()) && right(b.step()), "interleaved: right for both");
  b.close_scope(inner);
  check(!a.is_fused() && !b.is_fused(), "interleaved, both ended: LibTorch as it was");
  check(a.step() == stock && b.step() == stock, "the stock result to the bit");

  dlclose(b.handle);
  dlclose(a.handle);
  check(dlopen(arguments[1], RTLD_NOW | RTLD_NOLOAD) != nullptr, "what has registered kernels stays");
  outer = b.open_scope();
  check(b.is_fused() && right(b.step()), "fused and right after both objects were closed");
  check(b.gates_seen() == 1, "sessions after both objects were closed");
  b.close_scope(outer);
  check(!b.is_fused(), "LibTorch as it was at the end");
  return failures;
}
