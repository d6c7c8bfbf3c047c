# Defines the targets, for both the build tree and the installed tree.

# System libraries that Rust's standard library needs in a static link, as listed by
# `rustc --print native-static-libs`.
function(elastic_lora_system_libraries result)
    if(WIN32)
        set(${result} kernel32 ntdll userenv ws2_32 dbghelp bcrypt advapi32 PARENT_SCOPE)
    elseif(APPLE)
        set(${result} iconv m PARENT_SCOPE)
    else()
        set(${result} gcc_s util rt pthread m dl PARENT_SCOPE)
    endif()
endfunction()

function(elastic_lora_add_targets include shared soname import static)
    if(NOT TARGET elastic_lora::shared)
        add_library(elastic_lora::shared SHARED IMPORTED GLOBAL)
        set_target_properties(
            elastic_lora::shared
            PROPERTIES
                IMPORTED_LOCATION "${shared}"
                IMPORTED_SONAME "${soname}"
                INTERFACE_INCLUDE_DIRECTORIES "${include}"
        )
        if(import)
            set_target_properties(elastic_lora::shared PROPERTIES IMPORTED_IMPLIB "${import}")
        endif()
        if(APPLE)
            set_target_properties(elastic_lora::shared PROPERTIES IMPORTED_SONAME "@rpath/${soname}")
        endif()
    endif()
    if(NOT TARGET elastic_lora::static)
        elastic_lora_system_libraries(libraries)
        add_library(elastic_lora::static STATIC IMPORTED GLOBAL)
        set_target_properties(
            elastic_lora::static
            PROPERTIES
                IMPORTED_LOCATION "${static}"
                INTERFACE_INCLUDE_DIRECTORIES "${include}"
                INTERFACE_LINK_LIBRARIES "${libraries}"
        )
    endif()
endfunction()
