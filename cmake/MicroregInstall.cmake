# Install and export: headers, the target microreg::microreg, and a config that finds LibTorch and OpenMP again.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(microreg_config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/microreg")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/microreg" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS microreg EXPORT microregTargets)
install(EXPORT microregTargets NAMESPACE microreg:: DESTINATION "${microreg_config_dir}")
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/microregConfig.cmake.in"
                              "${PROJECT_BINARY_DIR}/microregConfig.cmake" INSTALL_DESTINATION "${microreg_config_dir}")
# Before 1.0 a minor version may break; a header-only library runs on any architecture.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/microregConfigVersion.cmake" COMPATIBILITY SameMinorVersion
                                 ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/microregConfig.cmake" "${PROJECT_BINARY_DIR}/microregConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/MicroregDependencies.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/MicroregLibTorch.cmake" DESTINATION "${microreg_config_dir}")
