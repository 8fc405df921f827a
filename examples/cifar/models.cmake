# The networks alone, which the trainer and the benchmarks share. Keep the list sorted.
include_guard(GLOBAL)
add_library(
  microreg_cifar_models STATIC
  "${CMAKE_CURRENT_LIST_DIR}/model_cnn.cpp" "${CMAKE_CURRENT_LIST_DIR}/model_resnet.cpp"
  "${CMAKE_CURRENT_LIST_DIR}/model_vgg.cpp" "${CMAKE_CURRENT_LIST_DIR}/models.cpp")
target_link_libraries(microreg_cifar_models PUBLIC microreg_development)
target_include_directories(microreg_cifar_models PUBLIC "${CMAKE_CURRENT_LIST_DIR}")
target_precompile_headers(microreg_cifar_models REUSE_FROM microreg_precompiled)
microreg_group_sources(microreg_cifar_models 4)
