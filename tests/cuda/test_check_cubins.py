"""The inspection of the machine code finds what it is there to find."""

import pathlib
import shutil
import subprocess

import check_cubins
import pytest

SOURCE = """
namespace bce_ext { namespace cuda {

// Values at indices that are not known: they must go to local memory.
template <typename T>
__global__ void spilling_kernel(T* data, int n) {
  T values[64];
  for (int i = 0; i < 64; ++i) values[(i * n) & 63] = data[i * n];
  for (int i = 0; i < n; ++i) data[i] = values[(i * i) & 63];
}

// The name and the parameters of a kernel that promises vectors, and accesses of four bytes.
template <typename Policy, typename Input, typename Target, bool kWeighted>
__global__ void vector_kernel(Input* input, const Target* target) {
  input[threadIdx.x] += target[threadIdx.x];
}

// Vectors of four: one load, four additions, one store and what keeps the loop going.
template <typename T>
__global__ void scale_kernel(T* data, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float4 value = reinterpret_cast<float4*>(data)[i];
    value.x += 1; value.y += 1; value.z += 1; value.w += 1;
    reinterpret_cast<float4*>(data)[i] = value;
  }
}

template __global__ void spilling_kernel<float>(float*, int);
template __global__ void vector_kernel<int, float, float, false>(float*, const float*);
template __global__ void scale_kernel<float>(float*, int);

} }
"""


@pytest.fixture(scope="module", params=["sm_75", "sm_90"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, check_cubins.Kernel]:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    try:
        check_cubins.tool("cuobjdump")
        check_cubins.tool("nvdisasm")
    except SystemExit as missing:
        pytest.skip(str(missing))
    directory = tmp_path_factory.mktemp("cubins")
    (directory / "planted.cu").write_text(SOURCE)
    cubin = directory / "planted.cubin"
    subprocess.run([nvcc, "-cubin", f"-arch={request.param}", "-o", cubin, directory / "planted.cu"], check=True)
    return {kernel.base: kernel for kernel in check_cubins.read_kernels(pathlib.Path(cubin))}


def test_local_memory_is_found(kernels: dict[str, check_cubins.Kernel]) -> None:
    found = check_cubins.violations(kernels["spilling_kernel"])
    assert any("stack" in violation for violation in found)
    assert any("STL" in violation for violation in found)


def test_missing_vector_accesses_are_found(kernels: dict[str, check_cubins.Kernel]) -> None:
    found = check_cubins.violations(kernels["vector_kernel"])
    assert any("LDG.E.128" in violation for violation in found)
    assert any("STG.E.128" in violation for violation in found)


def test_a_good_kernel_passes(kernels: dict[str, check_cubins.Kernel]) -> None:
    kernel = kernels["scale_kernel"]
    assert check_cubins.violations(kernel) == []
    assert kernel.title == "scale_kernel<float>"


@pytest.mark.parametrize(
    ("registers", "arch", "share"), [(32, "sm_90", 1.0), (40, "sm_90", 0.75), (48, "sm_90", 0.625), (48, "sm_75", 1.0)]
)
def test_occupancy(registers: int, arch: str, share: float) -> None:
    kernel = check_cubins.Kernel("bce_ext::cuda::vector_kernel<WithLogits, float, float, false>()", registers, 0, 0, [])
    assert kernel.occupancy(arch) == share
