# Install: headers, and a config that finds LibTorch again and makes the targets as this project does.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(MICROREG_CONFIG_DIR "${CMAKE_INSTALL_LIBDIR}/cmake/microreg" CACHE STRING "Where the package config is installed")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/microreg" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/microregConfig.cmake.in" "${PROJECT_BINARY_DIR}/microregConfig.cmake"
  INSTALL_DESTINATION "${MICROREG_CONFIG_DIR}" PATH_VARS CMAKE_INSTALL_INCLUDEDIR)
configure_file("${PROJECT_SOURCE_DIR}/cmake/microregConfigVersion.cmake.in"
               "${PROJECT_BINARY_DIR}/microregConfigVersion.cmake" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/microregConfig.cmake" "${PROJECT_BINARY_DIR}/microregConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/MicroregDependencies.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/MicroregLibTorch.cmake" "${PROJECT_SOURCE_DIR}/cmake/MicroregTargets.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/microreg.cpp" DESTINATION "${MICROREG_CONFIG_DIR}")
