"""wanfast under a diffusers pipeline; imported when `accelerate`, `restore` or `WanFastTransformer3DModel` is used."""

try:
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel  # noqa: F401
except ImportError as error:
    raise ImportError(
        "wanfast.accelerate, wanfast.restore and wanfast.WanFastTransformer3DModel need diffusers 0.35 or newer"
        f" ({error}); run: pip install 'diffusers>=0.35' transformers"
    ) from None
