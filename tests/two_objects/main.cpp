/// @file
/// Loads two shared objects that both include the headers, and opens scopes of both in one process: nested, interleaved
/// and from two threads at once. A third opens none and is unloaded, as are two plugins with autograd nodes. With
/// --versions: two that include different versions, of which the first to open a scope has it, and the second is
/// refused. The test fails, too, if anything is printed that looks like a warning.
#include "node.hpp"
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

template <class Pointer>
void find(void* handle, const char* name, Pointer& pointer) {
  pointer = reinterpret_cast<Pointer>(dlsym(handle, name));
}

void* load(const char* path, int visible = RTLD_LOCAL) {
  void* const handle = dlopen(path, RTLD_NOW | visible);
  if (handle == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(1);
  }
  return handle;
}

bool is_loaded(const char* path) { return dlopen(path, RTLD_NOW | RTLD_NOLOAD) != nullptr; }

struct Object {
  void* handle;
  decltype(&::open_scope) open_scope;
  decltype(&::close_scope) close_scope;
  decltype(&::step) step;
  decltype(&::stock_step) stock_step;
  decltype(&::difference_step) difference_step;
  decltype(&::has_own_function) has_own_function;
  decltype(&::is_fused) is_fused;
  decltype(&::refusal) refusal;
  decltype(&::gates_seen) gates_seen;
  decltype(&::gates_seen_in_step) gates_seen_in_step;

  explicit Object(const char* path, int visible = RTLD_LOCAL) : handle(load(path, visible)) {
    find(handle, "open_scope", open_scope);
    find(handle, "close_scope", close_scope);
    find(handle, "step", step);
    find(handle, "stock_step", stock_step);
    find(handle, "difference_step", difference_step);
    find(handle, "has_own_function", has_own_function);
    find(handle, "is_fused", is_fused);
    find(handle, "refusal", refusal);
    find(handle, "gates_seen", gates_seen);
    find(handle, "gates_seen_in_step", gates_seen_in_step);
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

/// Objects that have registered nothing go when they are closed, and what took a step with them goes on.
void check_unloaded(const Object& stays, const char* path, const char* node_path, const char* other_node_path) {
  double result = 0;
  const Object object(path);
  // In a thread of its own: an object whose thread_local variables are alive stays loaded.
  std::thread([&] { result = object.stock_step(); }).join();
  dlclose(object.handle);
  check(!is_loaded(path), "an object that opened no scope is unloaded");
  check(result == stays.stock_step(), "the same step as the other object's, after it was unloaded");

  const void* first_type = nullptr;
  for (const char* each : {node_path, other_node_path}) {
    void* const plugin = load(each);
    decltype(&make_tensor) make = nullptr;
    decltype(&delete_tensor) destroy = nullptr;
    decltype(&type_of_node) type = nullptr;
    find(plugin, "make_tensor", make);
    find(plugin, "delete_tensor", destroy);
    find(plugin, "type_of_node", type);
    void* const tensor = make();
    check(stays.has_own_function(tensor) == (each == other_node_path), "a plugin's node is taken for what it is");
    destroy(tensor);
    check(each == node_path || first_type == type(), "the second plugin's type lies where the first one's did");
    first_type = type();
    dlclose(plugin);
    check(!is_loaded(each), "the plugin is unloaded");
  }
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

  const double stepped = a.stock_step();
  for (const Object* object : {&a, &b}) {
    check(std::abs(object->difference_step() - stepped) < 1e-3 * stepped,
          "copies take the parameters' place, in either");
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

  check_unloaded(a, arguments[3], arguments[4], arguments[5]);

  dlclose(b.handle);
  dlclose(a.handle);
  check(is_loaded(arguments[1]), "what has registered kernels stays");
  outer = b.open_scope();
  check(b.is_fused() && right(b.step()), "fused and right after both objects were closed");
  check(b.gates_seen() == 1, "sessions after both objects were closed");
  b.close_scope(outer);
  check(!b.is_fused(), "LibTorch as it was at the end");
  return failures;
}
