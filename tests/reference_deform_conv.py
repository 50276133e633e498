"""Deformable convolution as loops over every output, written from the papers (DCNv1, DCNv2)."""

import math

import torch


def naive_deform_conv(
    x, offset, mask, weight, bias, stride, padding, dilation, groups, deformable_groups
):
    """Offsets are ordered by deformable group, tap in row-major order, (y, x)."""
    num_images, in_channels, height, width = x.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out = torch.zeros(num_images, out_channels, *offset.shape[2:], dtype=x.dtype)

    def sample(plane, y, x_):
        value = 0.0
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x_), math.floor(x_) + 1):
                if 0 <= row < height and 0 <= column < width:
                    value += (1 - abs(y - row)) * (1 - abs(x_ - column)) * float(plane[row, column])
        return value

    for n in range(num_images):
        for o in range(out_channels):
            group = o // (out_channels // groups)
            for i in range(offset.shape[2]):
                for j in range(offset.shape[3]):
                    total = 0.0 if bias is None else float(bias[o])
                    for c in range(group_channels):
                        channel = group * group_channels + c
                        d = channel // (in_channels // deformable_groups)
                        for ky in range(kernel_h):
                            for kx in range(kernel_w):
                                tap = d * kernel_h * kernel_w + ky * kernel_w + kx
                                y = i * stride[0] - padding[0] + ky * dilation[0]
                                y += float(offset[n, 2 * tap, i, j])
                                x_ = j * stride[1] - padding[1] + kx * dilation[1]
                                x_ += float(offset[n, 2 * tap + 1, i, j])
                                value = sample(x[n, channel], y, x_) * float(weight[o, c, ky, kx])
                                total += value * (
                                    1.0 if mask is None else float(mask[n, tap, i, j])
                                )
                    out[n, o, i, j] = total
    return out
