"""Conan 2 recipe. LibTorch is not a requirement: Conan Center has none, and the one that a program is built with has to
be the user's. It is found as in any build: through CMAKE_PREFIX_PATH, or beside an importable Python torch.

    conan create packaging/conan --build=missing -s compiler.cppstd=20
"""

import pathlib
import re

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeToolchain
from conan.tools.files import copy


class MicroregConan(ConanFile):
    name = "microreg"
    description = "Explicit regularizers by exact double backward for any LibTorch training loop"
    license = "MIT"
    topics = ("machine-learning", "libtorch", "regularization", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    no_copy_source = True

    def set_version(self):
        header = pathlib.Path(self.recipe_folder, "..", "..", "include", "microreg", "version.hpp")
        self.version = re.search(r'version = "([0-9.]+)"', header.read_text())[1]

    def export_sources(self):
        root = pathlib.Path(self.recipe_folder, "..", "..")
        for pattern in ("CMakeLists.txt", "LICENSE", "cmake/*", "include/*"):
            copy(self, pattern, src=root, dst=self.export_sources_folder)

    def validate(self):
        check_min_cppstd(self, 20)

    def package_id(self):
        self.info.clear()

    def generate(self):
        toolchain = CMakeToolchain(self)
        for part in ("TESTS", "EXAMPLES", "BENCHMARKS"):
            toolchain.cache_variables[f"MICROREG_BUILD_{part}"] = False
        toolchain.generate()

    def build(self):
        CMake(self).configure()

    def package(self):
        CMake(self).install()
        copy(self, "LICENSE", src=self.source_folder, dst=pathlib.Path(self.package_folder, "licenses"))

    def package_info(self):
        # The package's own config: it finds LibTorch again, and makes the targets.
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = ["lib/cmake/microreg"]
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
