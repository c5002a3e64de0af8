from detrkit.models.configuration import DetrFamilyConfig


class ToyDetrConfig(DetrFamilyConfig):
    model_type = "toy_detr"

    num_queries: int = 12
    d_model: int = 32
    encoder_layers: int = 1
    decoder_layers: int = 1
    encoder_ffn_dim: int = 48
    decoder_ffn_dim: int = 64
    class_cost: float | int = 2
    cls_loss_coefficient: float | int = 2
    focal_alpha: float | int = 0.25
