// nanobind's own code in one piece; the build passes its source folder.
#include <nb_combined.cpp>
