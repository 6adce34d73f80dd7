// Tables of float for exp and log, for processors that look up one of 32 numbers in an instruction (cpu/pack.h).
#pragma once

#include <cstdint>

namespace bce_ext {

namespace math {

constexpr int kTableBits = 5;
using Table = float[1 << kTableBits];

// 2^(j/32)
alignas(64) inline constexpr Table kPowers = {
    1.0f,       1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f, 1.1387886f, 1.1637249f,
    1.1892071f, 1.2152474f, 1.2418578f, 1.269051f,  1.2968396f, 1.3252367f, 1.3542556f, 1.38391f,
    1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f, 1.5759809f, 1.6104903f, 1.6457555f,
    1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f, 1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};

// 1/c and log(c) for a number c out of each interval that ends at 1 + j/32, or from j = 14 on at half of that. These
// come first; kPlaceOfOne is the place of the one that ends at 1, where c is 1. Each c is so chosen that log(c) is
// nearly a multiple of 2^-17, and is that here: its sum with a multiple of kLn2High is exact. It is off by at most
// 2^-28 of itself, and by 2^-30 in the interval that begins at 1.
constexpr uint32_t kPlaceOfOne = 18;
alignas(64) inline constexpr Table kReciprocals = {
    1.4027468f, 1.3761926f,  1.352956f,   1.3218871f,  1.2879696f,  1.2672181f,  1.2427363f, 1.2235909f,
    1.195365f,  1.1713773f,  1.1529353f,  1.1314639f,  1.1140836f,  1.0942955f,  1.0768616f, 1.0568392f,
    1.042083f,  1.0265534f,  1.0f,        0.984827f,   0.95578045f, 0.92734295f, 0.9011943f, 0.8778299f,
    0.8538001f, 0.83203894f, 0.81212014f, 0.78807724f, 0.7697921f,  0.7556463f,  0.7354323f, 0.7168849f};
alignas(64) inline constexpr Table kLogs = {
    -0.3384323f,  -0.31932068f, -0.30229187f, -0.27906036f, -0.25306702f, -0.23682404f, -0.21731567f, -0.20178986f,
    -0.17845154f, -0.15818024f, -0.1423111f,  -0.12351227f, -0.10803223f, -0.09011078f, -0.0740509f,  -0.055282593f,
    -0.04122162f, -0.02620697f, 0.0f,         0.015289307f, 0.04522705f,  0.075431824f, 0.104034424f, 0.13030243f,
    0.15805817f,  0.18387604f,  0.208107f,    0.23815918f,  0.26163483f,  0.28018188f,  0.30729675f,  0.33283997f};

}  // namespace math

}  // namespace bce_ext
