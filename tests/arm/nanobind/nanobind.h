// As much of nanobind as the extension's binding uses, for a program instead of a module: what is bound is called by
// messages (server.cpp), and so the kernels of another processor run under its emulator beside this machine's Python.
//
// A value is a tag and its bytes, in the order of this machine: 'i' int64, 'd' double, 's' string, 'l' list, 'n' none.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace nanobind {

// A message, read from its begin or written at its end.
struct Message {
    std::string bytes;
    size_t at = 0;

    template <class T>
    T take() {
        T value;
        if (bytes.size() - at < sizeof value) throw std::invalid_argument("a message that ends too early");
        std::memcpy(&value, bytes.data() + at, sizeof value);
        at += sizeof value;
        return value;
    }
    std::string take_bytes(size_t count) {
        if (bytes.size() - at < count) throw std::invalid_argument("a message that ends too early");
        at += count;
        return bytes.substr(at - count, count);
    }
    void expect(char tag) {
        const char found = take<char>();
        if (found != tag) throw std::invalid_argument(std::string("a value of kind ") + found + ", not " + tag);
    }
    template <class T>
    void put(T value) {
        bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
};

template <class T, class = void>
struct Value;

template <class T>
struct Value<T, std::enable_if_t<std::is_integral_v<T>>> {
    static T read(Message& m) {
        m.expect('i');
        return static_cast<T>(m.take<int64_t>());
    }
    static void write(Message& m, T value) {
        m.put('i');
        m.put(static_cast<int64_t>(value));
    }
};

template <class T>
struct Value<T, std::enable_if_t<std::is_floating_point_v<T>>> {
    static T read(Message& m) {
        const char tag = m.take<char>();
        if (tag == 'i') return static_cast<T>(m.take<int64_t>());
        if (tag != 'd') throw std::invalid_argument(std::string("a value of kind ") + tag + ", not a number");
        return static_cast<T>(m.take<double>());
    }
    static void write(Message& m, T value) {
        m.put('d');
        m.put(static_cast<double>(value));
    }
};

template <>
struct Value<std::string> {
    static std::string read(Message& m) {
        m.expect('s');
        return m.take_bytes(static_cast<size_t>(m.take<int64_t>()));
    }
    static void write(Message& m, const std::string& value) {
        m.put('s');
        m.put(static_cast<int64_t>(value.size()));
        m.bytes += value;
    }
};

template <class T>
struct Value<std::vector<T>> {
    static std::vector<T> read(Message& m) {
        m.expect('l');
        std::vector<T> all;
        for (int64_t left = m.take<int64_t>(); left > 0; --left) all.push_back(Value<T>::read(m));
        return all;
    }
    static void write(Message& m, const std::vector<T>& all) {
        m.put('l');
        m.put(static_cast<int64_t>(all.size()));
        for (const T& value : all) Value<T>::write(m, value);
    }
};

template <class... Ts>
struct Value<std::tuple<Ts...>> {
    static std::tuple<Ts...> read(Message& m) {
        m.expect('l');
        if (m.take<int64_t>() != sizeof...(Ts)) throw std::invalid_argument("a tuple of another length");
        return std::tuple<Ts...>{Value<Ts>::read(m)...};  // braces: from left to right
    }
    static void write(Message& m, const std::tuple<Ts...>& all) {
        m.put('l');
        m.put(static_cast<int64_t>(sizeof...(Ts)));
        std::apply([&](const Ts&... values) { (Value<Ts>::write(m, values), ...); }, all);
    }
};

using Call = std::function<void(Message& arguments, Message& result)>;

// What the program offers, by name.
inline std::map<std::string, Call>& calls() {
    static std::map<std::string, Call> all;
    return all;
}

template <class R, class... Args, class Fn>
Call call_of(Fn function) {
    return [function](Message& arguments, Message& result) {
        std::tuple<std::decay_t<Args>...> values{Value<std::decay_t<Args>>::read(arguments)...};
        if (arguments.at != arguments.bytes.size()) throw std::invalid_argument("too many arguments");
        if constexpr (std::is_void_v<R>) {
            std::apply(function, values);
            result.put('n');
        } else {
            Value<std::decay_t<R>>::write(result, std::apply(function, values));
        }
    };
}

// Of a lambda: what its call operator takes.
template <class Fn, class C, class R, class... Args>
Call call_of_operator(Fn function, R (C::*)(Args...) const) {
    return call_of<R, Args...>(function);
}
template <class R, class... Args>
Call make_call(R (*function)(Args...)) {
    return call_of<R, Args...>(function);
}
template <class Fn>
Call make_call(Fn function) {
    return call_of_operator(function, &Fn::operator());
}

struct gil_scoped_release {
    gil_scoped_release() {}
};
template <class>
struct call_guard {};
template <class...>
struct init {};
template <int, int>
struct keep_alive {};

inline void set_leak_warnings(bool) {}

template <class T>
struct Constant {
    T value;
};
template <class T>
Constant<T> cast(const T& value) {
    return {value};
}

struct Attribute {
    std::string name;
    template <class T>
    void operator=(const Constant<T>& constant) {
        calls()[name] = [constant](Message&, Message& result) { Value<T>::write(result, constant.value); };
    }
};

struct module_ {
    Attribute attr(const char* name) { return {name}; }
    template <class Fn, class... Extra>
    module_& def(const char* name, Fn function, const Extra&...) {
        calls()[name] = make_call(function);
        return *this;
    }
};

template <class Arg>
struct IsPointers : std::false_type {};
template <class T>
struct IsPointers<std::vector<T*>> : std::true_type {};

// Objects are known by number; the number is a method's first argument.
template <class T>
class class_ {
public:
    class_(module_&, const char* name) : name_(name) {
        calls()[name_ + ".free"] = make_call(+[](int64_t number) { objects().erase(number); });
    }
    // What is made of other objects, or works on them, is not there: nothing that runs here needs it.
    template <class... Args, class... Extra>
    class_& def(init<Args...>, const Extra&...) {
        constexpr bool of_objects = (takes_object<Args> || ...);
        if constexpr (!of_objects) {
            calls()[name_] = call_of<int64_t, Args...>([](const std::decay_t<Args>&... values) {
                static int64_t next = 0;
                objects()[++next] = std::make_unique<T>(values...);
                return next;
            });
        }
        return *this;
    }
    template <class R, class... Args>
    class_& def(const char* name, R (T::*method)(Args...)) {
        return add<R, Args...>(name, method);
    }
    template <class R, class... Args>
    class_& def(const char* name, R (T::*method)(Args...) const) {
        return add<R, Args...>(name, method);
    }

private:
    template <class Arg>
    static constexpr bool takes_object =
        (std::is_lvalue_reference_v<Arg> && !std::is_const_v<std::remove_reference_t<Arg>>) || IsPointers<std::decay_t<Arg>>::value;

    static std::map<int64_t, std::unique_ptr<T>>& objects() {
        static std::map<int64_t, std::unique_ptr<T>> all;
        return all;
    }
    template <class R, class... Args, class Method>
    class_& add(const char* name, Method method) {
        if constexpr (!(takes_object<Args> || ...)) {
            calls()[name_ + "." + name] = call_of<R, int64_t, Args...>(
                [method](int64_t number, const std::decay_t<Args>&... values) -> R {
                    return (*objects().at(number).*method)(values...);
                });
        }
        return *this;
    }

    std::string name_;
};

}  // namespace nanobind

#define NB_MODULE(name, m)                                                       \
    static void bind_all(nanobind::module_& m);                                  \
    void bind_module() {                                                         \
        nanobind::module_ m;                                                     \
        bind_all(m);                                                             \
    }                                                                            \
    static void bind_all(nanobind::module_& m)
