"""GPUs by name: what their vendors' data sheets promise, and what training gets out of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from groundswell.config import ConfigError, suggest

GB = 1e9  # of data sheets; devices show a few per cent more memory, which stays as a margin


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual server. Peaks are dense ones: data sheets print twice that, "with sparsity"."""

    name: str
    memory_gb: float
    bf16_tflops: float  # matrix products of bfloat16 with float32 sums; 0: the GPU has none
    tf32_tflops: float  # 0: none
    fp32_tflops: float
    memory_gbps: float  # HBM or GDDR, GB/s
    link_gbps: float  # GB/s to the other GPUs of the server, one direction (data sheets add both up)
    pcie_gbps: float  # GB/s to the host, one direction
    nic_gbps: float  # GB/s to other servers, for one GPU
    mfu: float  # part of the peak that matrix products of a real training step reach
    mfu_source: str
    source: str  # of the peaks

    def tflops(self, precision: str) -> float:
        """Dense peak in TFLOP/s. Raises ConfigError where the GPU does not have this precision."""
        peak = {"bf16": self.bf16_tflops, "tf32": self.tf32_tflops, "float32": self.fp32_tflops}.get(precision, 0.0)
        if not peak:
            have = [name for name in ("bf16", "tf32", "float32") if self.tflops_or_zero(name)]
            raise ConfigError(f"scaling.precision: {self.name} has no {precision}; use {' or '.join(have)}")
        return peak

    def tflops_or_zero(self, precision: str) -> float:
        return {"bf16": self.bf16_tflops, "tf32": self.tf32_tflops, "float32": self.fp32_tflops}[precision]

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * GB


# MosaicML's table of FSDP runs of 125M to 70B parameters (llm-foundry): H100 26 to 46 %, most about 40;
# A100 39 to 64 %, small networks about 45.
FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md"
ASSUMED = "an assumption: no published table of training runs"

GPUS = {
    gpu.name: gpu
    for gpu in (
        # name, GB, bf16, tf32, fp32, memory GB/s, link, PCIe, NIC (DGX: one a GPU), MFU
        Gpu("h200", 141, 989, 494, 67, 4_800, 450, 64, 50, 0.40, FOUNDRY, "NVIDIA H200 data sheet (SXM), DGX H200"),
        Gpu("h100-80", 80, 989, 494, 67, 3_350, 450, 64, 50, 0.40, FOUNDRY, "NVIDIA H100 data sheet (SXM), DGX H100"),
        Gpu("a100-80", 80, 312, 156, 19.5, 2_039, 300, 32, 25, 0.45, FOUNDRY, "NVIDIA A100 data sheet (SXM), DGX A100"),
        Gpu("a100-40", 40, 312, 156, 19.5, 1_555, 300, 32, 25, 0.45, FOUNDRY, "NVIDIA A100 data sheet (SXM), DGX A100"),
        # One 200 Gbit/s port for two GPUs (NVIDIA's OVX L40S servers).
        Gpu("l40s", 48, 362, 183, 91.6, 864, 32, 32, 12.5, 0.35, ASSUMED, "NVIDIA L40S data sheet"),
        # A workstation card: GPUs talk over PCIe, servers over one 100 Gbit/s port for eight.
        Gpu("rtx4090", 24, 165.2, 82.6, 82.6, 1_008, 32, 32, 1.6, 0.35, ASSUMED, "NVIDIA Ada architecture white paper"),
        # Megatron-LM (arXiv 1909.08053, section 5.1): 39 of 125 TFLOP/s.
        Gpu("v100-32", 32, 0, 0, 15.7, 900, 150, 16, 12.5, 0.31, "arXiv 1909.08053, section 5.1",
            "NVIDIA V100 data sheet (SXM2), DGX-2"),
    )
}  # fmt: skip
CUSTOM = "custom"


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError for an unknown name."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: {suggest(name, [*GPUS, CUSTOM])}")
    return GPUS[name]


def custom_gpu(memory_gib: float | None, tflops: float | None, bandwidth: float | None, nic: float | None) -> Gpu:
    """A GPU that is not in the table: memory in GiB, TFLOP/s in the run's precision, GB/s inside and between servers.

    What is not said is as for an A100 (memory bandwidth, PCIe, MFU). Raises ConfigError where memory or TFLOP/s lack.
    """
    if memory_gib is None or tflops is None:
        raise ConfigError("--gpu custom: needs --memory-gib and --tflops (dense, in the run's precision)")
    link = bandwidth or GPUS["a100-80"].pcie_gbps
    return dataclasses.replace(
        GPUS["a100-80"],
        name=CUSTOM,
        memory_gb=memory_gib * 2**30 / GB,
        bf16_tflops=tflops,
        tf32_tflops=tflops,
        fp32_tflops=tflops,
        link_gbps=link,
        nic_gbps=nic or min(link, GPUS["a100-80"].nic_gbps),
        mfu_source=ASSUMED,
        source="the command line",
    )
