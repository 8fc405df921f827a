// The one file that MicroregTargets.cmake compiles in each project that uses microreg::microreg.
#include <microreg/compiled.hpp>
