// Catch2 2 brings its main function by this macro, Catch2 3 by the same one in its amalgamated session header.
#define CATCH_CONFIG_RUNNER
#include "catch.hpp"

int main(int argc, char** argv) { return Catch::Session().run(argc, argv); }
