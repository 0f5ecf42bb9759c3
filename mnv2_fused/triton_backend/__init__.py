"""The block in Triton: kernels, launch, tuning. Imports triton where a submodule is imported, not here."""
