from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    openmp: bool
    cuda_architectures: str | None

class CpuPlan(TypedDict):
    threads: int
    by_rows: bool
    weight_bytes: int

cuda: bool

def cpu_capability() -> str: ...
def bfloat16_products() -> str: ...
def cached_bytes() -> int: ...
def empty_cache() -> None: ...
def build_info() -> BuildInfo: ...
def cpu_plan(cell: str, T: int, B: int, H: int, threads: int) -> CpuPlan: ...
