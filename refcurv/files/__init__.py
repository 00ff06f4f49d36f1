"""Files: HDF5 that any language can read, and checkpoint directories."""
