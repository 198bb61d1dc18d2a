"""What the operators' C++ kernels share: headers, the build file, and the loader of the library they make."""
