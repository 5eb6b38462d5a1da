"""Retrieval: mean average precision of nearest images by cosine. Suffixes: q queries, n gallery images, D width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_average_precision(
    queries_qD: Tensor, query_labels_q: Tensor, gallery_nD: Tensor, gallery_labels_n: Tensor, chunk: int = 256
) -> float:
    """Mean over queries of the average precision of the whole ranked gallery; relevant = same label.

    Queries without a relevant gallery image are left out. Ties keep the gallery's order.

    Raises:
        ValueError: no query has a relevant image.
    """
    gallery_Dn = F.normalize(gallery_nD, dim=1).T.contiguous()
    ranks_n = torch.arange(1, gallery_Dn.shape[1] + 1, dtype=torch.float32, device=gallery_Dn.device)
    total, count = 0.0, 0
    for part_qD, labels_q in zip(queries_qD.split(chunk), query_labels_q.split(chunk), strict=True):
        order_qn = (F.normalize(part_qD, dim=1) @ gallery_Dn).argsort(dim=1, descending=True, stable=True)
        hits_qn = (gallery_labels_n[order_qn] == labels_q[:, None]).float()
        relevant_q = hits_qn.sum(dim=1)
        precision_q = (hits_qn * hits_qn.cumsum(dim=1) / ranks_n).sum(dim=1)
        has = relevant_q > 0
        total += float((precision_q[has] / relevant_q[has]).double().sum())
        count += int(has.sum())
    if count == 0:
        raise ValueError("no query has a gallery image of its label")
    return total / count
