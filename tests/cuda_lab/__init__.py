"""A laboratory for the CUDA path on a machine without a GPU: what it launches, waits for, compiles and races on.

Nothing here runs on a device: every figure is *computed*. Each instrument is a module, and each is tested on
faults planted in copies of real code, so that a clean bill from it means something.

=====================  =============================================================================
``fake_device``        launches, waits, pageable copies and escapes from a capture, on fake tensors
``specialisations``    which compiled variants serving asks Triton for
``streams``            order between streams and the host, by vector clocks
``races``              conflicts between lanes of one program and between programs
``ptx``                read-only loads of written memory, barriers, in compiled kernels
``capture``            SGLang's own capture code against attention backends that record
=====================  =============================================================================
"""
