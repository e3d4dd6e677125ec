"""The ExecuTorch runner: C++ over the libraries of the `executorch` wheel, without Python or torch inside."""
