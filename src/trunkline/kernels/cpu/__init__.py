"""C++ kernels for CPUs: `native` is the module that `csrc/cpu` builds, `ops` makes a kernel set of it."""
