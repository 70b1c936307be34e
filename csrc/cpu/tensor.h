// What the operations need of a torch tensor, read from its attributes: five attribute reads cost 0.6 us,
// a DLPack exchange 3.5 us. No torch is needed to build this.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

namespace trunkline {

namespace nb = nanobind;

enum class Type { float32, float64, bfloat16, int32, int64, uint8, int8, boolean, other };

struct Tensor {
    static constexpr int MOST_DIMS = 6;
    char* data = nullptr;
    int dims = 0;
    long size[MOST_DIMS] = {};
    long stride[MOST_DIMS] = {};
    Type type = Type::other;
    nb::handle object;

    // Raises for what is no CPU tensor of at most five dimensions.
    Tensor(const char* operation, const char* name, nb::handle object);

    bool bf16() const { return type == Type::bfloat16; }
    long element() const {
        const bool byte = type == Type::uint8 || type == Type::int8 || type == Type::boolean;
        return byte ? 1 : bf16() ? 2 : type == Type::int64 || type == Type::float64 ? 8 : 4;
    }
    // Whether dimensions from `first` on lie side by side in memory.
    bool dense(int first = 0) const;
    std::string text() const;  // "[3, 4] bfloat16"

    // Raises ValueError "operation: name is [3, 4] bfloat16; <wanted> is expected".
    [[noreturn]] void refuse_for(const std::string& wanted) const;
    void floats() const {
        if (type != Type::float32 && !bf16()) refuse_for("float32 or bfloat16");
    }

private:
    const char* operation;
    const char* name;
};

[[noreturn]] void refuse(const std::string& message);

// The text is made only when the condition fails.
#define EXPECT(tensor, condition, wanted)               \
    do {                                                \
        if (!(condition)) (tensor).refuse_for(wanted);  \
    } while (false)

}  // namespace trunkline
