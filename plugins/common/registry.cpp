// The library's entry points: what TensorRT's load_library and trtexec --dynamicPlugins look for, and the tables for tests.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <exception>
#include <sstream>

#include "plugin.hpp"

using namespace nvinfer1;
using namespace nq::trt;

namespace {

std::atomic<ILoggerFinder*> finder{nullptr};

std::string number(double value) { // JSON has no infinity
    if (std::isinf(value)) return value > 0 ? "\"inf\"" : "\"-inf\"";
    std::ostringstream out;
    out.precision(17);
    out << value;
    return out.str();
}

std::string quoted(const std::string& text) { return "\"" + text + "\""; } // the tables have plain names only

template <class Items, class Show>
std::string list(const Items& items, Show show) {
    std::string all;
    for (const auto& item : items) all += (all.empty() ? "" : ", ") + show(item);
    return "[" + all + "]";
}

std::string type(DataType of) {
    switch (of) {
        case DataType::kFLOAT: return quoted("float32");
        case DataType::kHALF: return quoted("float16");
        case DataType::kBF16: return quoted("bfloat16");
        case DataType::kINT8: return quoted("int8");
        case DataType::kINT32: return quoted("int32");
        case DataType::kINT64: return quoted("int64");
        default: return quoted("other");
    }
}

std::string field(const Field& of) {
    if (of.kind == Kind::text)
        return "{\"name\": " + quoted(of.name) + ", \"type\": \"string\", \"default\": " + quoted(of.word) +
               ", \"values\": " + list(of.values, [](const char* value) { return quoted(value); }) + "}";
    return "{\"name\": " + quoted(of.name) + ", \"type\": " + quoted(of.kind == Kind::integer ? "int" : "float") +
           ", \"default\": " + number(of.number) + ", \"minimum\": " + number(of.minimum) + ", \"maximum\": " + number(of.maximum) + "}";
}

std::string port(const Port& of) {
    return "{\"name\": " + quoted(of.name) + ", \"shape\": " + quoted(of.shape) +
           ", \"types\": " + (of.same ? "[" + quoted(std::string("=") + of.same) + "]" : list(of.types, type)) +
           ", \"optional\": " + (of.optional ? "true" : "false") + "}";
}

// The inputs for each value of each text attribute, the others at their defaults.
std::string cases(const Definition& of) {
    std::string all;
    for (const Field& field : of.fields)
        for (const char* value : field.values) {
            Attributes attributes(of.fields);
            attributes.set_text(field.name, value);
            all += (all.empty() ? "" : ", ") + quoted(std::string(field.name) + "=" + value) + ": " + list(of.inputs(attributes), port);
        }
    return "{" + all + "}";
}

std::string definition(const Definition* of) {
    return "{\"name\": " + quoted(of->name) + ", \"version\": " + quoted(of->version) + ", \"fields\": " + list(of->fields, field) +
           ", \"inputs\": " + list(of->inputs(Attributes(of->fields)), port) + ", \"outputs\": " + list(of->outputs, port) +
           ", \"inputs_by\": " + cases(*of) + "}";
}

}  // namespace

void nq::trt::log_error(const std::string& message) noexcept {
    ILoggerFinder* const found = finder.load();
    ILogger* const logger = found ? found->findLogger() : nullptr;
    if (logger)
        logger->log(ILogger::Severity::kERROR, message.c_str());
    else
        std::fprintf(stderr, "nemoquant plugins: %s\n", message.c_str());
}

// TensorRT calls it once after loading, and keeps the finder alive.
extern "C" NEMOQUANT_API void setLoggerFinder(ILoggerFinder* given) { finder.store(given); }

extern "C" NEMOQUANT_API IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static std::vector<IPluginCreatorInterface*> all;
    try {
        if (all.empty())
            for (const auto& creator : creators()) all.push_back(creator.get());
    } catch (const std::exception& error) {
        log_error(error.what());
        all.clear();
    }
    count = static_cast<int32_t>(all.size());
    return all.data();
}

// The tables of all plugins as JSON: tests hold spec.yaml to them. Empty where memory runs out.
extern "C" NEMOQUANT_API const char* nemoquant_plugins_describe(void) {
    static std::string text;
    try {
        text = list(definitions(), definition);
    } catch (const std::exception& error) {
        log_error(error.what());
        text.clear();
    }
    return text.c_str();
}
