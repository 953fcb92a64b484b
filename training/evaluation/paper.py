"""The paper's own figures, beside which a report puts what it found (arXiv 2505.21032, Tables 1 and 3)."""

#: timm architecture, pooled -> (cosine, top-5 match in %, top-1 match in %, FID); 10,000 validation pictures of
#: ImageNet
RECONSTRUCTION = {
    ("resnet50.tv_in1k", False): (0.46, 91, 70, 11.49),
    ("resnet50.a1_in1k", False): (0.50, 90, 70, 11.51),
    ("convnext_base.fb_in22k_ft_in1k", False): (0.61, 94, 77, 8.20),
    ("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", False): (0.53, 95, 80, 12.69),
    ("resnet50.tv_in1k", True): (0.12, 48, 23, 31.64),
    ("resnet50.a1_in1k", True): (0.14, 44, 21, 37.44),
    ("convnext_base.fb_in22k_ft_in1k", True): (0.19, 44, 20, 31.67),
    ("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", True): (0.16, 47, 22, 49.04),
}


def beside(backbone: str, layer: str, pooled: bool) -> str:
    """One line with the paper's figures for the same features; "" where it has none."""
    if layer != "last" or (backbone, pooled) not in RECONSTRUCTION:
        return ""
    cosine, top5, top1, fid = RECONSTRUCTION[backbone, pooled]
    return (
        f"The paper, for the same features (Tables 1 and 3): cosine {cosine:.2f} on the unpooled map, top-5 match"
        f" {top5} %, top-1 match {top1} %, FID {fid}."
    )
