from model.tensorfile import DTYPES, Spec, TensorFile  # noqa: F401  moved there; the integrator deletes this file
