// The version, which is written twice: in words, and in the macros that name the inline namespace.
#include "helpers.hpp"

#include <c10/util/Type.h>
#include <microreg/error.hpp>
#include <microreg/version.hpp>

#include <string>

TEST_CASE("the version is the same in words, in macros and to the linker", "[version]") {
  const auto joined = [](const char* by) {
    return c10::str(MICROREG_VERSION_MAJOR, by, MICROREG_VERSION_MINOR, by, MICROREG_VERSION_PATCH);
  };
  CHECK(microreg::version == joined("."));
  CHECK(c10::demangle(typeid(microreg::Error).name()) == "microreg::v" + joined("_") + "::Error");
}
