"""How PyTorch sees each operation: checks, backend choice, fake, autograd, vmap, and the public function."""
