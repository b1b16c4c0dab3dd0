def absorb_pays(
    positions: int,
    tokens: int,
    image_dim: int,
    embed_dim: int,
    num_heads: int,
    *,
    out_dim: int | None = None,
    pool: bool = True,
    attend: bool = True,
) -> bool: ...
