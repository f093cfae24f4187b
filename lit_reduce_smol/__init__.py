"""The backbone ``smol``: SmolLM2-135M-Instruct and DINOv2-S/14 (saliency-tuned), joined by a projector trained here."""
