// nanobind's own code as one file; the build passes its source folder.
#include <nb_combined.cpp>
