# An overlay port in microreg's own source tree: it installs the tree that it stands in. Nothing is compiled before the
# user's build, and LibTorch is the user's.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(VCPKG_BUILD_TYPE release)  # headers are the same in both

vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS -DMICROREG_BUILD_TESTS=OFF -DMICROREG_BUILD_EXAMPLES=OFF -DMICROREG_BUILD_BENCHMARKS=OFF
          -DMICROREG_CONFIG_DIR=share/microreg)
vcpkg_cmake_install()

file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
