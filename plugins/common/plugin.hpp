// What the TensorRT faces share: a face is a Definition (tables, and two functions), the IPluginV3 around it is here, once.
//
//   definition      name, fields (the attributes), inputs and outputs with their shapes and dtypes, workspace, launch
//   createPlugin    reads the fields against the table: all must be there, none unknown or twice, each of its type and in its range
//   build           output shapes and dtypes follow from the tables; so do the format combinations
//   runtime         the fields are what is serialized; shapes are bound in onShapeChange and checked against the tables
//
// A face never throws through the interface, never ends the process and never touches the device but by its launcher: what is
// wrong is logged with its reason, and the call returns nullptr, false or a number other than 0.
//
// The shapes are those of spec.yaml, a word a dimension: a letter is a size and is equal wherever it stands; "K-1", "I/2" and "I*2"
// follow from one; a number is that number. Written for TensorRT 10 and 11; nothing of it is linked.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"

namespace nq::trt {

using nvinfer1::DataType;

constexpr double infinity = std::numeric_limits<double>::infinity();

enum class Kind { integer, real, text };

// One attribute. Make one by the three functions below.
struct Field {
    const char* name;
    Kind kind;
    double number;                    // default of an integer or a real
    const char* word;                 // default of a text
    double minimum, maximum;          // of an integer or a real, both allowed
    std::vector<const char*> values;  // of a text
};

Field integer(const char* name, int32_t fallback, int32_t minimum, int32_t maximum);
Field real(const char* name, double fallback, double minimum = -infinity, double maximum = infinity);
Field text(const char* name, const char* fallback, std::vector<const char*> values);

// One input or output. ``types``: any of these; or, with ``same``, the type that the input of that name has.
struct Port {
    const char* name;
    const char* shape;  // "B C K-1"
    std::vector<DataType> types;
    const char* same = nullptr;
    bool optional = false;  // inputs only, and only the last ones
};

// The fields' values, and the collection that serializes them. Not copied: the collection points into it.
class Attributes {
  public:
    // Throws std::invalid_argument with the reason.
    Attributes(const std::vector<Field>& table, const nvinfer1::PluginFieldCollection* given);
    // Every field at its default.
    explicit Attributes(const std::vector<Field>& table);
    Attributes(const Attributes&) = delete;
    Attributes& operator=(const Attributes&) = delete;

    int32_t integer(const char* name) const;
    float real(const char* name) const;
    const std::string& text(const char* name) const;
    void set_text(const char* name, const char* value);

    const nvinfer1::PluginFieldCollection& collection() const { return collection_; }
    // "format=fp8 activation=relu2": every field and its value.
    const std::string& id() const { return id_; }

  private:
    struct Value {
        Field field;
        int32_t integer = 0;
        float real = 0;
        std::string text;
    };
    const Value& value(const char* name, Kind kind) const;
    void collect();

    std::vector<Value> values_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
    std::string id_;
};

// The sizes by their letters; -1 is unknown.
class Sizes {
  public:
    Sizes() {
        of_.fill(-1);
        of_['1'] = 1;  // so that the word "1" is a size of one
    }
    int64_t operator[](char letter) const { return of_[static_cast<unsigned char>(letter) % of_.size()]; }
    int64_t& operator[](char letter) { return of_[static_cast<unsigned char>(letter) % of_.size()]; }

  private:
    std::array<int64_t, 128> of_;
};

// One call of the operator. Pointers are null when only the workspace is asked for; an input that is left out is null.
struct Call {
    const Attributes& attributes;
    Sizes sizes;
    std::vector<int32_t> input_types, output_types;  // enum nemoquant_dtype; -1 for INT8, which is bytes of some packed type
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    void* workspace = nullptr;
    void* stream = nullptr;
};

struct Definition {
    const char* name;
    const char* version;
    std::vector<Field> fields;
    // The inputs may follow from an attribute. They are asked for once, when a plugin is made.
    std::vector<Port> (*inputs)(const Attributes&);
    std::vector<Port> outputs;
    // Bytes; must not fall when a size grows, since an engine asks for the largest sizes of its profiles.
    size_t (*workspace)(const Call&);
    // 0, or an error whose reason nemoquant_last_error() has.
    int (*launch)(const Call&);
};

// Registers a definition with getCreators(); one static object in each plugin.cpp.
struct Registration {
    explicit Registration(const Definition& definition);
};

// ---- used by registry.cpp and plugin.cpp's shared half ----

void log_error(const std::string& message) noexcept;
std::vector<std::unique_ptr<nvinfer1::IPluginCreatorInterface>>& creators();
std::vector<const Definition*>& definitions();

}  // namespace nq::trt
